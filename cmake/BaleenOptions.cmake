# Build options and the compiler flags every target gets.
option(BALEEN_BUILD_TESTS "Build the test suite" ON)
option(BALEEN_BUILD_FUZZERS "Build the libFuzzer targets (clang only)" OFF)
option(BALEEN_STATIC_LIBRARIES "Link Abseil, yaml-cpp and HDF5 statically: for a bundle that runs elsewhere" OFF)
set(BALEEN_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO, ON or OFF")
set(BALEEN_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
# An installed tree may lie anywhere, with libraries of its own in lib/ if a host needs them.
set(CMAKE_INSTALL_RPATH "$ORIGIN/../lib")

find_program(BALEEN_CCACHE ccache)
if(BALEEN_CCACHE)
  set(CMAKE_C_COMPILER_LAUNCHER ${BALEEN_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${BALEEN_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${BALEEN_CCACHE})
endif()

add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
                    $<$<COMPILE_LANGUAGE:CXX>:-Wno-sign-compare> $<$<COMPILE_LANGUAGE:CXX>:-Wno-dangling-else>
                    $<$<COMPILE_LANGUAGE:CXX>:-Wno-missing-field-initializers>)
if(BALEEN_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${BALEEN_SANITIZE}>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>)
  add_link_options(-fsanitize=${BALEEN_SANITIZE})
else()
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fstack-protector-strong>)
endif()
