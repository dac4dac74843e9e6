// Streams, events, the check of their order, capture and replay, the log.
//
// A task runs when it is launched, in the thread that launches it. What a device would do in parallel is checked
// instead of done: every stream has a vector clock (Fidge and Mattern, 1988), an event carries the clock of the stream
// that recorded it, and a task may touch memory only if its clock covers the last accesses of other streams to it.
// The host has a clock too, which waiting for a stream or an event advances.
#include "standin.hpp"
#include <acl/acl.h>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <algorithm>
#include <mutex>
#include <set>
#include <thread>
#include <unistd.h>

namespace standin {

static std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

// ---- the log: one JSON object a line

static std::atomic<bool> log_to_memory = false;
static std::string log_text;
static std::mutex log_lock;
static FILE* log_file() {
  static FILE* file = [] {
    const char* path = getenv("CANN_STANDIN_LOG");
    return path && *path ? fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "w") : nullptr;
  }();
  return file;
}

bool logging() { return log_to_memory || log_file(); }

void log_event(const char* kind, const std::string& name, const std::string& operands) {
  std::string line = std::string("{\"kind\": \"") + kind + "\", \"name\": \"" + name + "\"";
  if (!operands.empty()) line += ", \"operands\": " + operands;
  line += "}\n";
  std::lock_guard guard(log_lock);
  if (log_to_memory) log_text += line;
  if (log_file()) fputs(line.c_str(), log_file()), fflush(log_file());
}

// ---- clocks

struct Clock {
  std::vector<uint64_t> times;  // by stream
  uint64_t at(size_t stream) const { return stream < times.size() ? times[stream] : 0; }
  uint64_t tick(size_t stream) {
    if (stream >= times.size()) times.resize(stream + 1);
    return ++times[stream];
  }
  void join(const Clock& other) {
    if (other.times.size() > times.size()) times.resize(other.times.size());
    for (size_t i = 0; i < other.times.size(); ++i) times[i] = std::max(times[i], other.times[i]);
  }
  bool covers(const Clock& other) const {
    for (size_t i = 0; i < other.times.size(); ++i)
      if (other.times[i] > at(i)) return false;
    return true;
  }
};

struct Access {
  size_t stream = 0;
  uint64_t time = 0;
  const std::string* name = nullptr;
};

static const std::string* interned(const std::string& name) {
  static std::set<std::string> names;
  return &*names.insert(name).first;
}

// The last accesses of every byte, as disjoint ranges.
class Accesses {
 public:
  // Returns the earlier access that a task with this clock may not follow, as text; empty if there is none.
  std::string add(const Range& range, bool writes, const Access& access, const Clock& clock) {
    std::string conflict;
    for (auto cell = split(range); cell != cells_.end() && cell->first < range.end; ++cell) {
      auto& [writer, readers, end] = cell->second;
      if (conflict.empty()) conflict = unordered(writer, access, clock, "written by ");
      if (!writes) {
        if (readers.empty() || readers.back().stream != access.stream) readers.push_back(access);
        else readers.back() = access;
        continue;
      }
      for (auto& reader : readers)
        if (conflict.empty()) conflict = unordered(reader, access, clock, "read by ");
      writer = access;
      readers.clear();
    }
    return conflict;
  }
  void forget(uintptr_t begin, uintptr_t end) {
    auto cell = cells_.lower_bound(begin);
    while (cell != cells_.end() && cell->first < end) cell = cells_.erase(cell);
  }

 private:
  struct Cell {
    Access writer;
    std::vector<Access> readers;
    uintptr_t end;
  };
  std::map<uintptr_t, Cell> cells_;

  static std::string unordered(const Access& before, const Access& now, const Clock& clock, const char* how) {
    if (!before.name || before.stream == now.stream || clock.at(before.stream) >= before.time) return "";
    return std::string(how) + *before.name + " in stream " + std::to_string(before.stream);
  }
  // Splits cells at both ends and fills gaps, so that cells cover the range exactly; returns the first.
  std::map<uintptr_t, Cell>::iterator split(const Range& range) {
    split_at(range.begin);
    split_at(range.end);
    uintptr_t at = range.begin;
    for (auto cell = cells_.lower_bound(range.begin); at < range.end; ++cell) {
      if (cell == cells_.end() || cell->first > at) {
        const uintptr_t end = cell == cells_.end() ? range.end : std::min(range.end, cell->first);
        cell = cells_.emplace(at, Cell{{}, {}, end}).first;
      }
      at = cell->second.end;
    }
    return cells_.lower_bound(range.begin);
  }
  void split_at(uintptr_t at) {
    auto next = cells_.upper_bound(at);
    if (next == cells_.begin()) return;
    auto cell = std::prev(next);
    if (cell->first == at || cell->second.end <= at) return;
    Cell rest = cell->second;
    cell->second.end = at;
    cells_.emplace(at, std::move(rest));
  }
};

// ---- streams, events, graphs

struct Event;
struct Node {
  Task task;
  Event* awaited = nullptr;  // an external event: a replay waits for it
  Event* reset = nullptr;
};

struct Graph {
  uint32_t id;
  aclmdlRICaptureMode mode;
  std::thread::id thread;
  std::vector<Node> nodes;
  Accesses accesses;
  std::set<struct Stream*> streams;
  std::vector<Range> reads, writes;  // of all nodes, merged
};

struct Stream {
  size_t id;
  int device;
  Clock clock;
  // Held while a task runs; the global lock is not, so that a collective that waits for another process blocks its own
  // stream only.
  std::recursive_mutex running;
  Graph* graph = nullptr;
  Clock captured;  // the clock inside the graph
};

struct Event {
  uint32_t flags = 0;
  bool recorded = false;
  Clock clock;
  Graph* graph = nullptr;  // recorded in this capture
  Clock captured;
};

static Accesses accesses;
static Clock host;  // clock of the host; the host's own accesses are those of stream 0
static size_t stream_ids = 0;
static uint32_t graph_ids = 0;
static std::set<Graph*> captures;
static std::set<Stream*> streams;
static std::map<int, Clock> ended;  // by device: of streams that were destroyed

static Stream* new_stream() {
  auto* stream = new Stream{++stream_ids, current_device()};
  streams.insert(stream);
  return stream;
}

static Stream* stream_of(void* pointer) {
  if (pointer) return static_cast<Stream*>(pointer);
  Guard guard(lock);
  static std::map<int, Stream*> null_streams;
  auto& stream = null_streams[current_device()];
  if (!stream) stream = new_stream();
  return stream;
}

void forget_accesses(uintptr_t begin, uintptr_t end) {
  Guard guard(lock);
  accesses.forget(begin, end);
}

static void check(Accesses& all, const Task& task, const Access& access, const Clock& clock) {
  auto report = [&](const Range& range, bool writes) {
    std::string conflict = all.add(range, writes, access, clock);
    if (!conflict.empty())
      die("unordered access: " + task.name + " in stream " + std::to_string(access.stream) + (writes ? " writes" : " reads") + " memory " + conflict + ", and nothing orders the two: an event or a wait is missing");
  };
  for (auto& range : task.reads) report(range, false);
  for (auto& range : task.writes) report(range, true);
}

// Keeps the ranges of device memory only: what the host does with its own memory is not seen.
static void keep_device_memory(Task& task, const Stream& stream) {
  for (auto* ranges : {&task.reads, &task.writes})
    std::erase_if(*ranges, [&](auto& range) {
      const int device = device_of(range.begin);
      if (device >= 0 && device != stream.device && task.name.rfind("copy", 0) != 0)
        die(task.name + " in a stream of device " + std::to_string(stream.device) + " touches memory of device " + std::to_string(device));
      return device < 0 || range.begin >= range.end;
    });
}

static void enter_order(const Task& task, Stream& stream) {
  stream.clock.join(host);  // what the host has seen is before what it launches
  const Access access{stream.id, stream.clock.tick(stream.id), interned(task.name)};
  check(accesses, task, access, stream.clock);
}

// Launches that touch more bytes are recorded and not run, for counts at sizes that take a host minutes.
static std::atomic<size_t> most_bytes = SIZE_MAX;
static bool runs(const Task& task) {
  size_t bytes = 0;
  for (auto* ranges : {&task.reads, &task.writes})
    for (auto& range : *ranges) bytes += range.end - range.begin;
  return bytes <= most_bytes;
}

int submit(Task task, void* pointer) {
  Stream& stream = *stream_of(pointer);
  Guard in_order(stream.running);
  std::unique_lock guard(lock);
  keep_device_memory(task, stream);
  if (stream.graph) {
    const Access access{stream.id, stream.captured.tick(stream.id), interned(task.name)};
    check(stream.graph->accesses, task, access, stream.captured);
    if (logging()) log_event("captured", task.name, task.operands);
    stream.graph->nodes.push_back({std::move(task)});
    return ACL_SUCCESS;
  }
  enter_order(task, stream);
  if (logging()) log_event("launch", task.name, task.operands);
  guard.unlock();
  if (runs(task)) task.run();
  return ACL_SUCCESS;
}

static thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

// Which operations of the host a capture forbids; see aclmdlRICaptureThreadExchangeMode.
static bool forbidden() {
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  for (auto* graph : captures) {
    if (graph->mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) return true;
    if (graph->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL && graph->thread == std::this_thread::get_id()) return true;
  }
  return false;
}

int host_access(const char* name, const std::vector<Range>& reads, const std::vector<Range>& writes) {
  Guard guard(lock);
  if (forbidden()) return refuse(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, std::string(name) + " is not allowed while a stream is captured");
  if (logging()) log_event("host_access", name);
  const Access access{0, host.tick(0), interned(name)};
  check(accesses, {name, {}, reads, writes, ""}, access, host);
  return ACL_SUCCESS;
}

static void merge(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  std::vector<Range> merged;
  for (auto& range : ranges)
    if (!merged.empty() && range.begin <= merged.back().end) merged.back().end = std::max(merged.back().end, range.end);
    else merged.push_back(range);
  ranges = std::move(merged);
}

static int replay(Graph& graph, Stream& stream) {
  Guard in_order(stream.running);
  std::unique_lock guard(lock);
  if (stream.graph) return refuse(ACL_ERROR_RT_STREAM_CAPTURED, "a graph is replayed in a stream that is captured");
  Task whole{"replay of graph " + std::to_string(graph.id), {}, graph.reads, graph.writes, ""};
  for (auto& node : graph.nodes)
    if (node.awaited) {
      if (!node.awaited->recorded) die("a replay waits for an event that is not recorded: it needs graph.update() before, or would wait forever");
      stream.clock.join(node.awaited->clock);
    }
  enter_order(whole, stream);
  if (logging()) log_event("replay", std::to_string(graph.nodes.size()));
  guard.unlock();
  for (auto& node : graph.nodes) {
    if (node.reset) node.reset->recorded = false;
    else if (!node.awaited && runs(node.task)) node.task.run();
  }
  return ACL_SUCCESS;
}

}  // namespace standin

using namespace standin;

extern "C" {

// ---- streams
aclError aclrtCreateStream(aclrtStream* stream) {
  Guard guard(lock);
  *stream = new_stream();
  return ACL_SUCCESS;
}
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }
aclError aclrtDestroyStream(aclrtStream pointer) {
  Guard guard(lock);
  auto* stream = static_cast<Stream*>(pointer);
  ended[stream->device].join(stream->clock);
  streams.erase(stream);
  delete stream;
  return ACL_SUCCESS;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSynchronizeStream(aclrtStream pointer) {
  Stream& stream = *stream_of(pointer);
  Guard in_order(stream.running);
  Guard guard(lock);
  if (stream.graph) return refuse(ACL_ERROR_RT_STREAM_CAPTURED, "a captured stream cannot be synchronized");
  if (logging()) log_event("wait", "aclrtSynchronizeStream");
  host.join(stream.clock);
  return ACL_SUCCESS;
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }
aclError aclrtSynchronizeDevice() {
  Guard guard(lock);
  if (forbidden()) return refuse(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "the device cannot be synchronized while a stream is captured");
  if (logging()) log_event("wait", "aclrtSynchronizeDevice");
  for (auto* stream : streams)
    if (stream->device == current_device()) host.join(stream->clock);
  host.join(ended[current_device()]);
  return ACL_SUCCESS;
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }
aclError aclrtStreamQuery(aclrtStream pointer, aclrtStreamStatus* status) {
  Guard guard(lock);
  Stream& stream = *stream_of(pointer);
  if (stream.graph) return refuse(ACL_ERROR_RT_STREAM_CAPTURED, "a captured stream cannot be queried");
  host.join(stream.clock);
  *status = ACL_STREAM_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  Guard guard(lock);
  *id = int32_t(stream_of(stream)->id);
  return ACL_SUCCESS;
}
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return ACL_SUCCESS; }
aclError aclrtSetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t) { return ACL_SUCCESS; }
aclError aclrtUseStreamResInCurrentThread(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) { return ACL_SUCCESS; }

// ---- events
static Event& event_of(aclrtEvent event) { return *static_cast<Event*>(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flags) {
  auto* made = new Event;
  made->flags = flags;
  *event = made;
  return ACL_SUCCESS;
}
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flags) { return aclrtCreateEventExWithFlag(event, flags); }
aclError aclrtDestroyEvent(aclrtEvent event) {
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}
aclError aclrtRecordEvent(aclrtEvent pointer, aclrtStream stream_pointer) {
  Guard guard(lock);
  Event& event = event_of(pointer);
  Stream& stream = *stream_of(stream_pointer);
  event.graph = stream.graph;
  if (stream.graph) {
    event.captured = stream.captured;
    return ACL_SUCCESS;
  }
  stream.clock.join(host);
  event.clock = stream.clock;
  event.recorded = true;
  return ACL_SUCCESS;
}
aclError aclrtResetEvent(aclrtEvent pointer, aclrtStream stream_pointer) {
  Guard guard(lock);
  Stream& stream = *stream_of(stream_pointer);
  if (stream.graph) stream.graph->nodes.push_back({{"reset of an event"}, nullptr, &event_of(pointer)});
  else event_of(pointer).recorded = false;
  return ACL_SUCCESS;
}
aclError aclrtStreamWaitEvent(aclrtStream stream_pointer, aclrtEvent pointer) {
  Guard guard(lock);
  Event& event = event_of(pointer);
  Stream& stream = *stream_of(stream_pointer);
  if (captures.count(event.graph)) {
    if (stream.graph && stream.graph != event.graph) return refuse(ACL_ERROR_STREAM_CAPTURE_CONFLICT, "the event belongs to another capture than the stream");
    if (!stream.graph) {  // a fork: the waiting stream joins the capture
      stream.graph = event.graph;
      stream.captured = {};
      event.graph->streams.insert(&stream);
    }
    stream.captured.join(event.captured);
    return ACL_SUCCESS;
  }
  if (stream.graph) {
    if (event.flags != ACL_EVENT_EXTERNAL) return refuse(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for an event that was recorded outside the capture");
    stream.graph->nodes.push_back({{"wait for an event"}, &event, nullptr});
    return ACL_SUCCESS;
  }
  stream.clock.join(event.clock);
  return ACL_SUCCESS;
}
static int finished(Event& event) {
  if (captures.count(event.graph)) return refuse(ACL_ERROR_RT_EVENT_CAPTURED, "an event of a capture cannot be queried or waited for by the host");
  host.join(event.clock);
  return ACL_SUCCESS;
}
aclError aclrtSynchronizeEvent(aclrtEvent event) {
  Guard guard(lock);
  if (logging()) log_event("wait", "aclrtSynchronizeEvent");
  return finished(event_of(event));
}
aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t) { return aclrtSynchronizeEvent(event); }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  Guard guard(lock);
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return finished(event_of(event));
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
  Guard guard(lock);
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return finished(event_of(event));
}
aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent, aclrtEvent) {
  *milliseconds = 0.001f;  // times mean nothing here
  return ACL_SUCCESS;
}

// ---- capture
aclError aclmdlRICaptureBegin(aclrtStream pointer, aclmdlRICaptureMode mode) {
  Guard guard(lock);
  if (!pointer) return refuse(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured");
  Stream& stream = *stream_of(pointer);
  if (stream.graph) return refuse(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is captured already");
  auto* graph = new Graph{++graph_ids, mode, std::this_thread::get_id()};
  graph->streams.insert(&stream);
  stream.graph = graph;
  stream.captured = {};
  captures.insert(graph);
  return ACL_SUCCESS;
}
aclError aclmdlRICaptureEnd(aclrtStream pointer, aclmdlRI* model) {
  Guard guard(lock);
  Stream& origin = *stream_of(pointer);
  Graph* graph = origin.graph;
  if (!graph) return refuse(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not captured");
  bool joined = true;
  for (auto* stream : graph->streams) {
    joined = joined && origin.captured.covers(stream->captured);
    stream->graph = nullptr;
  }
  captures.erase(graph);
  *model = graph;
  if (!joined) return refuse(ACL_ERROR_RT_STREAM_UNJOINED, "the capture contains a stream that was not joined to the original stream");
  for (auto& node : graph->nodes) {
    graph->reads.insert(graph->reads.end(), node.task.reads.begin(), node.task.reads.end());
    graph->writes.insert(graph->writes.end(), node.task.writes.begin(), node.task.writes.end());
  }
  merge(graph->reads);
  merge(graph->writes);
  return ACL_SUCCESS;
}
aclError aclmdlRICaptureGetInfo(aclrtStream pointer, aclmdlRICaptureStatus* status, aclmdlRI* model) {
  Guard guard(lock);
  Graph* graph = stream_of(pointer)->graph;
  *status = graph ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (model) *model = graph;
  return ACL_SUCCESS;
}
aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return ACL_SUCCESS;
}
aclError aclmdlRIGetId(aclmdlRI model, uint32_t* id) {
  *id = model ? static_cast<Graph*>(model)->id : 0;
  return ACL_SUCCESS;
}
aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  return replay(*static_cast<Graph*>(model), *stream_of(stream));
}
aclError aclmdlRIDestroy(aclmdlRI model) {
  Guard guard(lock);
  delete static_cast<Graph*>(model);
  return ACL_SUCCESS;
}
// ---- for tests and benchmarks, by ctypes: the log, and which launches run
void standin_run_up_to(size_t bytes) { most_bytes = bytes; }
void standin_log_start() {
  std::lock_guard guard(log_lock);
  log_text.clear();
  log_to_memory = true;
}
// Stops and returns the lines; valid until the next start.
const char* standin_log_stop() {
  std::lock_guard guard(log_lock);
  log_to_memory = false;
  return log_text.c_str();
}
}
