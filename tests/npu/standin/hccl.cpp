// Collectives between processes, over a shared file. A rank copies what it gives into its part of the file, waits for
// the others, takes what it needs, and waits again; longer messages go in parts.
#include "standin.hpp"
#include <acl/acl.h>
#include <hccl/hccl.h>
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <stdexcept>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

namespace standin {

constexpr size_t PART = size_t(1) << 22;  // bytes that a rank gives at a time
constexpr uint32_t MOST_RANKS = 16;

struct Header {
  std::atomic<uint32_t> joined;
  std::atomic<uint64_t> arrived[MOST_RANKS];  // barriers that each rank has reached
  std::atomic<uint64_t> sent[MOST_RANKS][MOST_RANKS], received[MOST_RANKS][MOST_RANKS];  // parts, by pair of ranks
};

struct Aborted {};

struct Communicator {
  std::string name;
  uint32_t size, rank;
  Header* header;
  char* parts;
  size_t bytes;
  uint64_t barriers = 0;
  uint64_t out[MOST_RANKS] = {}, in[MOST_RANKS] = {};
  std::atomic<bool> aborted = false;

  char* part(uint32_t of) const { return parts + PART * of; }
  char* pair_part(uint32_t from, uint32_t to) const { return parts + PART * (size + from * size + to); }

  template <class Condition>
  void wait(Condition reached) const {
    for (int spins = 0; !reached(); ++spins) {
      if (aborted) throw Aborted{};
      if (spins > 200) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  void barrier() {
    header->arrived[rank] = ++barriers;
    for (uint32_t other = 0; other < size; ++other) wait([&] { return header->arrived[other] >= barriers; });
  }
};

static Communicator& of(HcclComm comm) { return *static_cast<Communicator*>(comm); }

static size_t item_size(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_UINT32: case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
    default: die("HcclDataType " + std::to_string(type) + " has no implementation");
  }
}

// -- reductions, in the order of the ranks; bf16 in fp32
struct Bf16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  static Bf16 of(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return {0x7fc0};
    return {uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};
template <class Wide>
static Wide reduced(Wide a, Wide b, HcclReduceOp op) {
  switch (op) {
    case HCCL_REDUCE_SUM: return a + b;
    case HCCL_REDUCE_PROD: return a * b;
    case HCCL_REDUCE_MAX: return std::max(a, b);
    case HCCL_REDUCE_MIN: return std::min(a, b);
    default: die("HcclReduceOp " + std::to_string(op) + " has no implementation");
  }
}
template <class Item, class Wide>
static void reduce(const Communicator& comm, char* result, size_t offset, size_t count, HcclReduceOp op) {
  for (size_t i = 0; i < count; ++i) {
    Wide total = Wide(reinterpret_cast<Item*>(comm.part(0) + offset)[i]);
    for (uint32_t rank = 1; rank < comm.size; ++rank) total = reduced(total, Wide(reinterpret_cast<Item*>(comm.part(rank) + offset)[i]), op);
    if constexpr (std::is_same_v<Item, Bf16>) reinterpret_cast<Item*>(result)[i] = Bf16::of(total);
    else reinterpret_cast<Item*>(result)[i] = Item(total);
  }
}
static void reduce(const Communicator& comm, void* to, size_t offset, size_t count, HcclDataType type, HcclReduceOp op) {
  auto* result = static_cast<char*>(to);
  switch (type) {
    case HCCL_DATA_TYPE_INT8: return reduce<int8_t, int8_t>(comm, result, offset, count, op);
    case HCCL_DATA_TYPE_INT32: return reduce<int32_t, int32_t>(comm, result, offset, count, op);
    case HCCL_DATA_TYPE_INT64: return reduce<int64_t, int64_t>(comm, result, offset, count, op);
    case HCCL_DATA_TYPE_FP32: return reduce<float, float>(comm, result, offset, count, op);
    case HCCL_DATA_TYPE_BFP16: return reduce<Bf16, float>(comm, result, offset, count, op);
    default: die("a reduction of HcclDataType " + std::to_string(type) + " has no implementation");
  }
}

static HcclResult collective(const char* name, HcclComm comm, std::vector<Range> reads, std::vector<Range> writes, std::function<void(Communicator&)> run, aclrtStream stream) {
  Communicator& communicator = of(comm);
  std::string operands;
  if (logging()) operands = "[" + std::to_string(writes.empty() ? 0 : writes[0].end - writes[0].begin) + "]";
  const int code = submit({name, [&communicator, run] {
    try {
      run(communicator);
    } catch (Aborted&) {  // the result is not used
    }
  }, std::move(reads), std::move(writes), operands}, stream);
  return code ? HCCL_E_RUNTIME : HCCL_SUCCESS;
}
static Range bytes_at(const void* pointer, size_t size) { return {uintptr_t(pointer), uintptr_t(pointer) + size}; }

// Calls ``each`` with the offset and the size of every part of a message.
template <class Each>
static void in_parts(size_t size, size_t most, Each each) {
  for (size_t offset = 0; offset < size; offset += most) each(offset, std::min(most, size - offset));
}

static void send(Communicator& comm, const char* from, size_t size, uint32_t to) {
  in_parts(size, PART, [&](size_t offset, size_t length) {
    auto& taken = comm.header->received[comm.rank][to];
    comm.wait([&] { return taken >= comm.out[to]; });
    memcpy(comm.pair_part(comm.rank, to), from + offset, length);
    comm.header->sent[comm.rank][to] = ++comm.out[to];
  });
}
static void receive(Communicator& comm, char* to, size_t size, uint32_t from) {
  in_parts(size, PART, [&](size_t offset, size_t length) {
    auto& given = comm.header->sent[from][comm.rank];
    comm.wait([&] { return given > comm.in[from]; });
    memcpy(to + offset, comm.pair_part(from, comm.rank), length);
    comm.header->received[from][comm.rank] = ++comm.in[from];
  });
}

struct Message {
  char* pointer;
  size_t size;
  uint32_t rank;
};
// All at once, as a device's engines would: no order of sends and receives may lead to a deadlock.
static void exchange(Communicator& comm, const std::vector<Message>& sends, const std::vector<Message>& receives) {
  std::vector<std::thread> threads;
  std::atomic<bool> aborted = false;
  auto start = [&](auto transfer, const Message& message) {
    threads.emplace_back([&, transfer, message] {
      try {
        transfer(comm, message.pointer, message.size, message.rank);
      } catch (Aborted&) {
        aborted = true;
      }
    });
  };
  for (auto& message : sends) start([](auto& c, char* p, size_t n, uint32_t r) { send(c, p, n, r); }, message);
  for (auto& message : receives) start([](auto& c, char* p, size_t n, uint32_t r) { receive(c, p, n, r); }, message);
  for (auto& thread : threads) thread.join();
  if (aborted) throw Aborted{};
}

static Communicator* join(const std::string& name, uint32_t size, uint32_t rank) {
  if (size > MOST_RANKS) die("more than 16 ranks have no implementation");
  const char* folder = getenv("TMPDIR");
  const std::string path = std::string(folder && *folder ? folder : "/tmp") + "/cann-standin-" + name;
  const size_t bytes = sizeof(Header) + PART * (size + size * size);  // sparse
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0 || ftruncate(file, bytes)) die("cannot share " + path);
  auto* memory = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  close(file);
  if (memory == MAP_FAILED) die("cannot map " + path);
  auto* comm = new Communicator{name, size, rank, reinterpret_cast<Header*>(memory), memory + sizeof(Header), bytes};
  if (++comm->header->joined == size) unlink(path.c_str());
  comm->wait([&] { return comm->header->joined >= size; });
  return comm;
}

}  // namespace standin

using namespace standin;

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  static std::atomic<int> count = 0;
  memset(info->internal, 0, sizeof(info->internal));
  snprintf(info->internal, sizeof(info->internal), "%d-%d", int(getpid()), ++count);
  return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* info, uint32_t rank, HcclComm* comm) {
  *comm = join(info->internal, size, rank);
  return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* info, uint32_t rank, const HcclCommConfig*, HcclComm* comm) {
  return HcclCommInitRootInfo(size, info, rank, comm);
}
HcclResult HcclGetCommName(HcclComm comm, char* name) {
  strncpy(name, of(comm).name.c_str(), COMM_NAME_MAX_LENGTH);
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
  *size = of(comm).size;
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  *rank = of(comm).rank;
  return HCCL_SUCCESS;
}
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* error) {
  *error = HCCL_SUCCESS;
  return HCCL_SUCCESS;
}
// Ends the waits of other threads; the memory stays, as one of them may still leave a wait.
HcclResult HcclCommDestroy(HcclComm comm) {
  of(comm).aborted = true;
  return HCCL_SUCCESS;
}
uint32_t HcclGetCommConfigCapability() { return 0; }  // no member of HcclCommConfig is needed
const char* HcclGetErrorString(HcclResult) { return "HCCL error"; }

HcclResult HcclAllReduce(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  const size_t item = item_size(type), size = count * item;
  return collective("HcclAllReduce", comm, {bytes_at(from, size)}, {bytes_at(to, size)}, [=](Communicator& c) {
    in_parts(size, PART, [&](size_t offset, size_t length) {
      memcpy(c.part(c.rank), static_cast<char*>(from) + offset, length);
      c.barrier();
      reduce(c, static_cast<char*>(to) + offset, 0, length / item, type, op);
      c.barrier();
    });
  }, stream);
}
HcclResult HcclReduceScatter(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  const size_t item = item_size(type), size = count * item;
  const uint32_t ranks = of(comm).size;
  return collective("HcclReduceScatter", comm, {bytes_at(from, size * ranks)}, {bytes_at(to, size)}, [=](Communicator& c) {
    const size_t most = PART / ranks / item * item;
    in_parts(size, most, [&](size_t offset, size_t length) {
      for (uint32_t rank = 0; rank < ranks; ++rank) memcpy(c.part(c.rank) + most * rank, static_cast<char*>(from) + size * rank + offset, length);
      c.barrier();
      reduce(c, static_cast<char*>(to) + offset, most * c.rank, length / item, type, op);
      c.barrier();
    });
  }, stream);
}
HcclResult HcclAllGather(void* from, void* to, uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream) {
  const size_t size = count * item_size(type);
  return collective("HcclAllGather", comm, {bytes_at(from, size)}, {bytes_at(to, size * of(comm).size)}, [=](Communicator& c) {
    in_parts(size, PART, [&](size_t offset, size_t length) {
      memcpy(c.part(c.rank), static_cast<char*>(from) + offset, length);
      c.barrier();
      for (uint32_t rank = 0; rank < c.size; ++rank) memcpy(static_cast<char*>(to) + size * rank + offset, c.part(rank), length);
      c.barrier();
    });
  }, stream);
}
HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm, aclrtStream stream) {
  const size_t size = count * item_size(type);
  return collective("HcclBroadcast", comm, {}, {bytes_at(buffer, size)}, [=](Communicator& c) {
    in_parts(size, PART, [&](size_t offset, size_t length) {
      if (c.rank == root) memcpy(c.part(root), static_cast<char*>(buffer) + offset, length);
      c.barrier();
      if (c.rank != root) memcpy(static_cast<char*>(buffer) + offset, c.part(root), length);
      c.barrier();
    });
  }, stream);
}
HcclResult HcclSend(void* from, uint64_t count, HcclDataType type, uint32_t to, HcclComm comm, aclrtStream stream) {
  const size_t size = count * item_size(type);
  return collective("HcclSend", comm, {bytes_at(from, size)}, {}, [=](Communicator& c) { send(c, static_cast<char*>(from), size, to); }, stream);
}
HcclResult HcclRecv(void* to, uint64_t count, HcclDataType type, uint32_t from, HcclComm comm, aclrtStream stream) {
  const size_t size = count * item_size(type);
  return collective("HcclRecv", comm, {}, {bytes_at(to, size)}, [=](Communicator& c) { receive(c, static_cast<char*>(to), size, from); }, stream);
}
HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm, aclrtStream stream) {
  std::vector<Message> sends, receives;
  std::vector<Range> reads, writes;
  for (uint32_t i = 0; i < count; ++i) {
    auto& item = items[i];
    const size_t size = item.count * item_size(item.dataType);
    const bool sent = item.sendRecvType == HCCL_SEND;
    (sent ? sends : receives).push_back({static_cast<char*>(item.buf), size, item.remoteRank});
    (sent ? reads : writes).push_back(bytes_at(item.buf, size));
  }
  return collective("HcclBatchSendRecv", comm, reads, writes, [=](Communicator& c) { exchange(c, sends, receives); }, stream);
}
HcclResult HcclAlltoAllV(const void* from, const void* send_counts, const void* send_starts, HcclDataType send_type, const void* to, const void* receive_counts, const void* receive_starts, HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  const size_t send_item = item_size(send_type), receive_item = item_size(receive_type);
  std::vector<Message> sends, receives;
  std::vector<Range> reads, writes;
  auto at = [](const void* numbers, uint32_t index) { return static_cast<const uint64_t*>(numbers)[index]; };
  for (uint32_t rank = 0; rank < of(comm).size; ++rank) {
    auto* source = const_cast<char*>(static_cast<const char*>(from)) + at(send_starts, rank) * send_item;
    auto* target = const_cast<char*>(static_cast<const char*>(to)) + at(receive_starts, rank) * receive_item;
    sends.push_back({source, at(send_counts, rank) * send_item, rank});
    receives.push_back({target, at(receive_counts, rank) * receive_item, rank});
    reads.push_back(bytes_at(source, sends.back().size));
    writes.push_back(bytes_at(target, receives.back().size));
  }
  return collective("HcclAlltoAllV", comm, reads, writes, [=](Communicator& c) { exchange(c, sends, receives); }, stream);
}
}
