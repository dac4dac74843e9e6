// Devices and their memory, the host's memory, settings, and what torch_npu asks about the machine.
#include "standin.hpp"
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <malloc.h>
#include <map>
#include <mutex>
#include <unistd.h>

namespace standin {

static std::mutex lock;
static thread_local std::string last_error;
static thread_local int device = 0;

void die(const std::string& message) {
  fprintf(stderr, "cann stand-in: %s\n", message.c_str());
  fflush(stderr);
  _exit(70);
}

int refuse(int code, const std::string& message) {
  last_error = message;
  if (logging()) log_event("refused", message);
  return code;
}

static long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

// The devices that a process sees: CANN renumbers those of ASCEND_RT_VISIBLE_DEVICES from 0.
static int visible_devices() {
  static const int count = [] {
    const long present = setting("CANN_STANDIN_DEVICES", 1);
    const char* visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!visible) return int(present);
    int found = 0;
    for (const char* at = visible; *at;) {
      char* end;
      const long id = strtol(at, &end, 10);
      if (end == at || id < 0 || id >= present) break;
      ++found;
      at = *end == ',' ? end + 1 : end;
      if (at == end && *at) break;
    }
    return found;
  }();
  return count;
}

int current_device() { return device; }

// Operators allocate and free large temporaries all the time: keep their pages.
static const int kept = mallopt(M_MMAP_THRESHOLD, 1 << 30) + mallopt(M_TRIM_THRESHOLD, 1 << 30);

// ---- memory: every allocation is accounted, and its content is not zero

struct Block {
  size_t size;
  int device;
};
static std::map<uintptr_t, Block> blocks;
static std::map<int, size_t> used;

static size_t capacity() {
  static const size_t bytes = size_t(setting("CANN_STANDIN_MIB", 65536)) << 20;
  return bytes;
}

int device_of(uintptr_t address) {
  std::lock_guard guard(lock);
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return -1;
  auto& [begin, block] = *--next;
  return address < begin + block.size ? block.device : -1;
}

static int allocate(void** pointer, size_t size, bool on_device) {
  constexpr size_t SPARE = 64;              // CANN's operators may read past the end of a tensor
  constexpr size_t POISONED = size_t(1) << 26;
  if (on_device) {
    std::lock_guard guard(lock);
    if (used[device] + size > capacity()) return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "device memory is exhausted");
  }
  if (posix_memalign(pointer, 512, size + SPARE)) return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "host memory is exhausted");
  memset(*pointer, 0xff, std::min(size, POISONED));  // NaN in every floating-point type
  if (on_device) {
    std::lock_guard guard(lock);
    blocks[uintptr_t(*pointer)] = {size, device};
    used[device] += size;
    if (logging()) log_event("allocation", std::to_string(size));
  }
  return ACL_SUCCESS;
}

static int release(void* pointer) {
  Block block;
  {
    std::lock_guard guard(lock);
    auto found = blocks.find(uintptr_t(pointer));
    if (found == blocks.end()) die("aclrtFree of an address that is not allocated");
    block = found->second;
    used[block.device] -= block.size;
    blocks.erase(found);
  }
  forget_accesses(uintptr_t(pointer), uintptr_t(pointer) + block.size);
  free(pointer);
  return ACL_SUCCESS;
}

}  // namespace standin

using namespace standin;

extern "C" {

void standin_missing(const char* name) { die(std::string(name) + " has no implementation"); }

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = visible_devices();
  return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t* id) {
  *id = device;
  return ACL_SUCCESS;
}
aclError aclrtSetDevice(int32_t id) {
  if (id < 0 || id >= visible_devices()) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "device " + std::to_string(id) + " does not exist");
  device = id;
  return ACL_SUCCESS;
}
const char* aclrtGetSocName() { return "Ascend910B3"; }
const char* aclGetRecentErrMsg() { return last_error.c_str(); }

aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size, true); }
aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size, true); }
aclError aclrtMallocHost(void** pointer, size_t size) { return allocate(pointer, size, false); }
aclError aclrtMallocHostWithCfg(void** pointer, uint64_t size, aclrtMallocConfig*) { return allocate(pointer, size, false); }
aclError aclrtFree(void* pointer) { return release(pointer); }
aclError aclrtFreeHost(void* pointer) {
  free(pointer);
  return ACL_SUCCESS;
}
aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total) {
  std::lock_guard guard(lock);
  *free_bytes = capacity() - used[device];
  *total = capacity();
  return ACL_SUCCESS;
}
static Range range(const void* pointer, size_t size) { return {uintptr_t(pointer), uintptr_t(pointer) + size}; }
static int copy(void* to, size_t room, const void* from, size_t size) {
  if (size > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "a copy is larger than its destination");
  memmove(to, from, size);
  return ACL_SUCCESS;
}
aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind) {
  if (int code = host_access("aclrtMemcpy", {range(from, size)}, {range(to, size)})) return code;
  return copy(to, room, from, size);
}
aclError aclrtMemset(void* to, size_t room, int32_t value, size_t size) {
  if (int code = host_access("aclrtMemset", {}, {range(to, size)})) return code;
  if (size > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "a memset is larger than its destination");
  memset(to, value, size);
  return ACL_SUCCESS;
}
aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
  if (size > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "a copy is larger than its destination");
  const char* name = kind == ACL_MEMCPY_HOST_TO_DEVICE ? "copy_from_host" : kind == ACL_MEMCPY_DEVICE_TO_HOST ? "copy_to_host" : "copy";
  return submit({name, [=] { memmove(to, from, size); }, {range(from, size)}, {range(to, size)}, ""}, stream);
}
aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t size, aclrtStream stream) {
  if (size > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "a memset is larger than its destination");
  return submit({"memset", [=] { memset(to, value, size); }, {}, {range(to, size)}, ""}, stream);
}

// What torch_npu asks about the device. 24 cube cores, as a 910B3 has at least 20: no result depends on it.
aclError aclrtGetCurrentContext(aclrtContext* context) {
  *context = reinterpret_cast<aclrtContext>(1);
  return ACL_SUCCESS;
}
aclError aclrtGetPrimaryCtxState(int32_t, uint32_t*, int32_t* active) {
  if (active) *active = 1;
  return ACL_SUCCESS;
}
aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t* value) {
  *value = 24;
  return ACL_SUCCESS;
}
aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t* value) {
  *value = 24;
  return ACL_SUCCESS;
}
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t* value) {
  *value = 1;
  return ACL_SUCCESS;
}
aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 64; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t) {
  strcpy(value, "disable");
  return ACL_SUCCESS;
}
// A 910B computes with infinities and NaNs; other optional features are absent.
aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static const aclCannAttr attributes[] = {ACL_CANN_ATTR_INF_NAN};
  *list = attributes;
  *count = 1;
  return ACL_SUCCESS;
}
aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  *value = attribute == ACL_CANN_ATTR_INF_NAN;
  return ACL_SUCCESS;
}
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
  *value = 1;
  return ACL_SUCCESS;
}
// Both of these decide which of several operators op-plugin calls.
static const char* version() {
  const char* value = getenv("CANN_STANDIN_VERSION");
  return value && *value ? value : "8.5.0";
}
int aclsysGetVersionStr(char*, char* text) {
  strcpy(text, version());
  return ACL_SUCCESS;
}
aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* package) {
  strcpy(package->version, version());
  return ACL_SUCCESS;
}

// Settings that change how fast, how strictly or how verbosely CANN works, not what it computes.
aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
aclError aclrtSetCurrentContext(aclrtContext) { return ACL_SUCCESS; }
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  if (actual) *actual = timeout;
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetExceptionInfoCallback(aclrtExceptionInfoCallback) { return ACL_SUCCESS; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}
aclError aclmdlInitDump() { return ACL_SUCCESS; }
aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }
}
