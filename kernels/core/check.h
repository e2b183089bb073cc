// CHECK: faults of the programmer. Prints file, line, expression and the values, then aborts; stays
// on in release.
//
//   CHECK(x.dim(0) == num_tokens) << "router: one row a token";
//   CHECK_EQ(x.dim(1), hidden_size) << x.DebugString();
//
// Faults of the outside world are absl::Status (status.h). DCHECK is for hot loops and vanishes in
// release.
#pragma once

#include <memory>
#include <sstream>
#include <string>

namespace baleen::check_internal {

// Collects the message; its destructor prints it and aborts the process.
class Failure {
 public:
  Failure(const char* file, int line, const std::string& what);
  [[noreturn]] ~Failure();
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

template <typename A, typename B>
std::unique_ptr<std::string> Describe(const char* expression, const A& a, const B& b) {
  std::ostringstream out;
  out << expression << " (" << a << " vs. " << b << ")";
  return std::make_unique<std::string>(out.str());
}

}  // namespace baleen::check_internal

#define CHECK(condition)      \
  if (condition) [[likely]] { \
  } else /* NOLINT */         \
    ::baleen::check_internal::Failure(__FILE__, __LINE__, #condition).stream()

#define BALEEN_CHECK_OP(a, op, b)                                                                 \
  if (auto baleen_failure =                                                                       \
          ((a)op(b)) ? nullptr : ::baleen::check_internal::Describe(#a " " #op " " #b, (a), (b)); \
      !baleen_failure) [[likely]] {                                                               \
  } else /* NOLINT */                                                                             \
    ::baleen::check_internal::Failure(__FILE__, __LINE__, *baleen_failure).stream()

#define CHECK_EQ(a, b) BALEEN_CHECK_OP(a, ==, b)
#define CHECK_NE(a, b) BALEEN_CHECK_OP(a, !=, b)
#define CHECK_LT(a, b) BALEEN_CHECK_OP(a, <, b)
#define CHECK_LE(a, b) BALEEN_CHECK_OP(a, <=, b)
#define CHECK_GT(a, b) BALEEN_CHECK_OP(a, >, b)
#define CHECK_GE(a, b) BALEEN_CHECK_OP(a, >=, b)

#define CHECK_OK(expression)                                                    \
  if (auto baleen_ok = (expression); baleen_ok.ok()) [[likely]] {               \
  } else /* NOLINT */                                                           \
    ::baleen::check_internal::Failure(__FILE__, __LINE__, #expression).stream() \
        << baleen_ok.ToString()

#ifdef NDEBUG
#define DCHECK(condition) \
  while (false) CHECK(condition)
#else
#define DCHECK(condition) CHECK(condition)
#endif
