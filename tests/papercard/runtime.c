/* A CUDA runtime and a cuBLAS of paper: one card, whose memory is reserved address space and whose kernels do nothing.

   Preloaded, it takes the place of the functions that torch's CUDA libraries and bitsandbytes' import from libcudart, libcublas
   and libcublasLt. build.py adds a function that returns 0 for every imported name that is not here. What is here must answer:

   - devices     count, properties, attributes: a grid size of 0 would divide by zero in CUB
   - memory      cudaMalloc with the card's size as its limit, cudaMemGetInfo, cudaPointerGetAttributes, copies
   - handles     streams, events, cuBLAS handles: any address that is not null
   - kernels     occupancy above 0, binary and PTX version of a function
   - cuBLASLt    one algorithm that needs no workspace

   PAPERCARD_MIB is the card's memory (default 4096), PAPERCARD_CAPABILITY its compute capability (default 86).
   PAPERCARD_OTHERS_MIB is what other programs and the CUDA context take (default 300). */
#define _GNU_SOURCE
#include <driver_types.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, RUNTIME_VERSION = 13000, DRIVER_VERSION = 13020, CUBLAS_VERSION = 130000 };
enum { PAGE = 2 << 20, MAX_BLOCKS = 1 << 20, HANDLE_BYTES = 4096 };
enum { THREADS_PER_BLOCK = 1024, REGISTERS = 65536, SHARED_BYTES = 49152, SHARED_OPTIN_BYTES = 65536, PROCESSORS = 16 };

static size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? (size_t)atol(text) : otherwise;
}
static size_t total(void) { return setting("PAPERCARD_MIB", 4096) << 20; }
static int capability(void) { return (int)setting("PAPERCARD_CAPABILITY", 86); }
/* The version that a kernel of torch is built for on this card: there is none for 8.9, which runs those of 8.6. */
static int built_for(void) { return capability() == 89 ? 86 : capability(); }
/* Threads of a multiprocessor, among which a reduction divides its rows. */
static int threads(void) { return capability() < 80 ? 1024 : capability() == 80 ? 2048 : 1536; }

/* --- memory --- */
static struct { char *start; size_t size; } blocks[MAX_BLOCKS];
static int count;
static size_t allocated;

static size_t used(void) { return allocated + (setting("PAPERCARD_OTHERS_MIB", 300) << 20); }

static void *reserve(size_t size) {
  return mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = total();
  *free_bytes = used() < total() ? total() - used() : 0;
  return SUCCESS;
}

/* As the driver does, in pages of 2 MiB. */
int cudaMalloc(void **start, size_t size) {
  size = (size + PAGE - 1) / PAGE * PAGE;
  if (used() + size > total() || count == MAX_BLOCKS) return OUT_OF_MEMORY;
  *start = reserve(size);
  blocks[count].start = *start;
  blocks[count++].size = size;
  allocated += size;
  return SUCCESS;
}

int cudaFree(void *start) {
  for (int i = 0; i < count; i++) {
    if (blocks[i].start != start) continue;
    munmap(start, blocks[i].size);
    allocated -= blocks[i].size;
    blocks[i] = blocks[--count];
    break;
  }
  return SUCCESS;
}

/* Unified memory lies in the main memory, as far as the card is concerned. */
int cudaMallocManaged(void **start, size_t size, unsigned flags) { *start = reserve(size); return SUCCESS; }
int cudaHostAlloc(void **start, size_t size, unsigned flags) { *start = calloc(1, size); return SUCCESS; }
int cudaFreeHost(void *start) { free(start); return SUCCESS; }

/* A single value that is read from the card is zero, in every run: no overflow was found, the loss is 0. */
int cudaMemcpy(void *to, void *from, size_t size, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost && size <= 8) memset(to, 0, size);
  else memcpy(to, from, size);
  return SUCCESS;
}
int cudaMemcpyAsync(void *to, void *from, size_t size, enum cudaMemcpyKind kind, void *stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return SUCCESS; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return SUCCESS; }

int cudaPointerGetAttributes(struct cudaPointerAttributes *found, void *pointer) {
  memset(found, 0, sizeof *found);
  for (int i = 0; i < count; i++)
    if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size) found->type = cudaMemoryTypeDevice;
  return SUCCESS;
}

/* --- the device --- */
int cudaGetDeviceCount(int *found) { *found = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = RUNTIME_VERSION; return SUCCESS; }

static const struct { int attribute, value; } attributes[] = {
    {cudaDevAttrMaxThreadsPerBlock, THREADS_PER_BLOCK},
    {cudaDevAttrMaxBlockDimX, THREADS_PER_BLOCK},
    {cudaDevAttrMaxBlockDimY, THREADS_PER_BLOCK},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 2147483647},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxSharedMemoryPerBlock, SHARED_BYTES},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_OPTIN_BYTES},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, SHARED_OPTIN_BYTES},
    {cudaDevAttrTotalConstantMemory, 65536},
    {cudaDevAttrMaxRegistersPerBlock, REGISTERS},
    {cudaDevAttrMaxRegistersPerMultiprocessor, REGISTERS},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrClockRate, 1500000},
    {cudaDevAttrMultiProcessorCount, PROCESSORS},
    {cudaDevAttrMaxBlocksPerMultiprocessor, 16},
    {cudaDevAttrMemoryClockRate, 6001000},
    {cudaDevAttrGlobalMemoryBusWidth, 128},
    {cudaDevAttrL2CacheSize, 2097152},
        {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrManagedMemory, 1},
    {cudaDevAttrConcurrentManagedAccess, 1},
};

int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = 0;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = capability() / 10;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = capability() % 10;
  if (attribute == cudaDevAttrMaxThreadsPerMultiProcessor) *value = threads();
  for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
    if (attributes[i].attribute == (int)attribute) *value = attributes[i].value;
  return SUCCESS;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  snprintf(found->name, sizeof found->name, "Paper card %d.%d", capability() / 10, capability() % 10);
  found->totalGlobalMem = total();
  found->major = capability() / 10;
  found->minor = capability() % 10;
  found->multiProcessorCount = PROCESSORS;
  found->maxThreadsPerMultiProcessor = threads();
  found->warpSize = 32;
  found->maxThreadsPerBlock = THREADS_PER_BLOCK;
  found->sharedMemPerBlock = SHARED_BYTES;
  found->sharedMemPerBlockOptin = found->sharedMemPerMultiprocessor = SHARED_OPTIN_BYTES;
  found->regsPerBlock = found->regsPerMultiprocessor = REGISTERS;
  found->l2CacheSize = 2097152;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = THREADS_PER_BLOCK;
  found->maxThreadsDim[2] = 64;
  return SUCCESS;
}

/* --- streams, events and kernels --- */
static int handle(void **made) { *made = calloc(1, HANDLE_BYTES); return SUCCESS; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return handle(stream); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *status, void *id) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status, void *id) { *status = 0; return SUCCESS; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1; return SUCCESS; }
int cudaEventElapsedTime_v2(float *ms, void *start, void *end) { *ms = 1; return SUCCESS; }

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks_found, void *kernel, int size, size_t shared) {
  *blocks_found = 2;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_found, void *kernel, int size, size_t shared, unsigned flags) {
  *blocks_found = 2;
  return SUCCESS;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *found, void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = THREADS_PER_BLOCK;
  found->binaryVersion = found->ptxVersion = built_for();
  found->numRegs = 32;
  return SUCCESS;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handles[4]; return handles; }
unsigned __cudaPushCallConfiguration(void) { return SUCCESS; }
int __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) {
  memset(grid, 0, 12);
  memset(block, 0, 12);
  *shared = 0;
  *stream = 0;
  return SUCCESS;
}

const char *cudaGetErrorString(int error) { return error == OUT_OF_MEMORY ? "out of memory" : "an error of the paper card"; }
const char *cudaGetErrorName(int error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorPaper"; }

/* --- cuBLAS --- */
int cublasCreate_v2(void **made) { return handle(made); }
int cublasLtCreate(void **made) { return handle(made); }
int cublasGetVersion_v2(void *library, int *version) { *version = CUBLAS_VERSION; return SUCCESS; }
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
const char *cublasGetStatusString(int status) { return "a status of the paper card"; }
int cublasLtMatmulAlgoGetHeuristic(void *library, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
  memset(results, 0, 64);
  *found = 1;
  return SUCCESS;
}
