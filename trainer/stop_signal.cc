#include "trainer/stop_signal.h"

#include <csignal>
#include <cstring>

namespace baleen {
namespace {

volatile std::sig_atomic_t g_signal = 0;  // set by the handler
int g_heard = 0;                          // what the handler is installed for; 0: nothing

void OnSignal(int signal) { g_signal = signal; }

int NumberOf(CheckpointSignal signal) {
  switch (signal) {
    case CheckpointSignal::kUsr1:
      return SIGUSR1;
    case CheckpointSignal::kUsr2:
      return SIGUSR2;
    case CheckpointSignal::kTerm:
      return SIGTERM;
    case CheckpointSignal::kNone:
      break;
  }
  return 0;
}

void SetHandler(int number, void (*handler)(int)) {
  struct sigaction action;
  std::memset(&action, 0, sizeof(action));
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigaction(number, &action, nullptr);
}

}  // namespace

void ListenFor(CheckpointSignal signal) {
  const int number = NumberOf(signal);
  if (g_heard != 0 && g_heard != number) {
    SetHandler(g_heard, SIG_DFL);
    if (g_signal == g_heard) std::raise(g_heard);
  }
  g_heard = number;
  if (number == 0) return;
  SetHandler(number, OnSignal);
  // A launcher may have started the process with the signal blocked: it would never arrive.
  sigset_t own;
  sigemptyset(&own);
  sigaddset(&own, number);
  pthread_sigmask(SIG_UNBLOCK, &own, nullptr);
}

bool StopSignalled() { return g_signal != 0; }

}  // namespace baleen
