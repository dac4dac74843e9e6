// What the parts of the stand-in share. No torch here: the runtime compiles in a second.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace standin {

// Ends the process with a message: what is not implemented or not allowed must never pass unseen.
[[noreturn]] void die(const std::string& message);

// Device memory that a task reads or writes; a strided view is the range from its first to its last byte.
struct Range {
  uintptr_t begin, end;
};

// One launch: an operator, a copy, a collective.
struct Task {
  std::string name;
  std::function<void()> run;
  std::vector<Range> reads, writes;
  std::string operands;  // JSON, for the log; empty where nothing is logged
};

// Runs a task in its stream's order, or records it where the stream is captured. Returns an aclError.
int submit(Task task, void* stream);

bool logging();
void log_event(const char* kind, const std::string& name, const std::string& operands = "");

// The device of the calling thread, and the device that an address belongs to (-1: none).
int current_device();
int device_of(uintptr_t address);

// The order of memory accesses, which a stream must have seen before it reads.
void forget_accesses(uintptr_t begin, uintptr_t end);

// Returns CANN's error code, and keeps the message for aclGetRecentErrMsg.
int refuse(int code, const std::string& message);

// For a function of the host that reads or writes device memory without a stream.
int host_access(const char* name, const std::vector<Range>& reads, const std::vector<Range>& writes);

}  // namespace standin
