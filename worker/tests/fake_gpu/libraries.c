// GPUs that are not there: as much of NVIDIA's driver, compiler, cuBLASLt and NCCL as the worker uses, so that its own side
// is tested where there is no GPU. Memory is the host's and copies are made; kernels and products compute nothing, but the
// kernel that finds the likeliest token leaves one, so that text flows. A GPU belongs to the thread that uses it.
//
// What goes wrong is in environment variables, and what was done goes to the file that FAKE_GPU_LOG names:
//   FAKE_GPU_FAULT=KERNEL:N  the N-th launch of a kernel fails on its GPU, and whatever call comes next is told
//   FAKE_GPU_HANG=N          the N-th sum fails on rank 1, and rank 0 waits for it until it leaves the group
//   FAKE_GPU_REFUSE=1        cuBLASLt refuses every way to multiply that it has not just given
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OUT_OF_MEMORY = 2, NOT_READY = 600, ILLEGAL_ADDRESS = 700, NOT_WHILE_RECORDING = 900 };

static atomic_long chained, plain, recordings, replays, groups, left;
static atomic_int waiting;         // a sum waits for a rank that will not come
static __thread int fault;         // of this thread's GPU, for ever
static __thread int recording;     // calls that a recording cannot hold are refused
static __thread long launches;     // of the kernel that is to fail

__attribute__((destructor)) static void write_log(void) {
    const char *path = getenv("FAKE_GPU_LOG");
    FILE *log = path ? fopen(path, "w") : NULL;
    if (!log) return;
    fprintf(log, "chained %ld\nplain %ld\nrecordings %ld\nreplays %ld\ngroups %ld\nleft %ld\n", chained, plain,
            recordings, replays, groups, left);
    fclose(log);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// The driver: GPUs and their memory.
#define GPUS 2
#define MEMORY ((size_t)6 << 30)
// More is neither copied nor cleared: it was zero, and nobody looks at it.
#define MUCH ((size_t)64 << 20)

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorName(int code, const char **name) {
    *name = code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
    return 0;
}
int cuGetErrorString(int code, const char **text) {
    *text = code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "another error";
    return 0;
}
int cuDeviceGetCount(int *n) { return *n = GPUS, 0; }
int cuDeviceGet(int *device, int n) { return *device = n, 0; }
int cuDeviceGetName(char *name, int room, int device) { return snprintf(name, room, "GPU of a test"), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    enum { MULTIPROCESSORS = 16, MAJOR = 75 };
    return *value = attribute == MULTIPROCESSORS ? 132 : attribute == MAJOR ? 9 : 0, 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(intptr_t)(device + 1), 0; }
int cuCtxSetCurrent(void *context) { return fault; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = *total = MEMORY, fault; }
static int allocate(void **at, size_t bytes) {
    if (recording) return NOT_WHILE_RECORDING;
    return (*at = calloc(1, bytes)) ? fault : OUT_OF_MEMORY;
}
int cuMemAlloc_v2(void **at, size_t bytes) { return allocate(at, bytes); }
int cuMemFree_v2(void *at) { return free(at), fault; }
int cuMemHostAlloc(void **at, size_t bytes, unsigned flags) { return allocate(at, bytes); }
int cuMemFreeHost(void *at) { return free(at), fault; }
int cuMemHostRegister_v2(void *at, size_t bytes, unsigned flags) { return fault; }
int cuMemHostUnregister(void *at) { return fault; }
static int copy(void *to, const void *from, size_t bytes) {
    if (bytes <= MUCH) memmove(to, from, bytes);
    return fault;
}
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) { return copy(to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) { return copy(to, from, bytes); }
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) { return copy(to, from, bytes); }
int cuMemsetD8Async(void *to, unsigned char byte, size_t bytes, void *stream) {
    if (bytes <= MUCH) memset(to, byte, bytes);
    return fault;
}
int cuTensorMapEncodeTiled(void) { return fault; }

// Streams and points in them. All is done when it is asked for, but a sum that waits.
int cuStreamCreate(void **stream, unsigned flags) { return *stream = calloc(1, sizeof(void *)), 0; }
int cuStreamSynchronize(void *stream) {
    if (recording) return NOT_WHILE_RECORDING;
    while (waiting) usleep(1000);
    return fault;
}
int cuEventCreate(double **event, unsigned flags) { return *event = calloc(1, sizeof(double)), fault; }
int cuEventDestroy_v2(double *event) { return free(event), fault; }
int cuEventRecord(double *event, void *stream) {
    if (recording) return NOT_WHILE_RECORDING;
    return *event = seconds(), fault;
}
int cuEventQuery(double *event) { return fault ? fault : waiting ? NOT_READY : 0; }
int cuEventSynchronize(double *event) { return cuStreamSynchronize(NULL); }
int cuEventElapsedTime_v2(float *ms, double *from, double *to) { return *ms = (float)((*to - *from) * 1e3), fault; }

// Kernels, and recordings of them.
typedef struct { char name[64]; } Kernel;
typedef struct { const Kernel *kernel; unsigned blocks; uint64_t *best; } Launch;
typedef struct { Launch launches[1024]; size_t n; } Graph;
static __thread Graph *graph;

int cuModuleLoadData(void **module, const void *code) { return *module = (void *)code, 0; }
int cuModuleGetFunction(Kernel **kernel, void *module, const char *name) {
    *kernel = calloc(1, sizeof(Kernel));
    snprintf((*kernel)->name, sizeof((*kernel)->name), "%s", name);
    return 0;
}
int cuFuncSetAttribute(Kernel *kernel, int attribute, int value) { return 0; }

// As head.cu does: a finite logit above, a token below.
static void run(const Launch *launch) {
    for (unsigned i = 0; launch->best && i < launch->blocks; ++i)
        launch->best[i] = (uint64_t)0xbf800000u << 32 | (uint32_t) ~(i % 7);
}

static int is_to_fail(const Kernel *kernel) {
    const char *wanted = getenv("FAKE_GPU_FAULT"), *number = wanted ? strchr(wanted, ':') : NULL;
    if (!number || strncmp(wanted, kernel->name, number - wanted) || kernel->name[number - wanted]) return 0;
    return ++launches == atol(number + 1);
}

static int launch(const Kernel *kernel, unsigned blocks, void **arguments) {
    if (fault) return fault;
    if (is_to_fail(kernel)) return fault = ILLEGAL_ADDRESS, 0;
    Launch made = {kernel, blocks, NULL};
    if (!strcmp(kernel->name, "argmax_merge")) made.best = *(uint64_t **)arguments[4];
    if (!graph) return run(&made), 0;
    if (graph->n == sizeof(graph->launches) / sizeof(Launch)) return NOT_WHILE_RECORDING;
    return graph->launches[graph->n++] = made, 0;
}
int cuLaunchKernel(Kernel *kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra) {
    return plain++, launch(kernel, x, arguments);
}
int cuLaunchKernelEx(const unsigned *config, Kernel *kernel, void **arguments, void **extra) {
    return chained++, launch(kernel, config[0], arguments);
}
int cuStreamBeginCapture_v2(void *stream, int mode) {
    return graph = calloc(1, sizeof(Graph)), recording = 1, fault;
}
int cuStreamEndCapture(void *stream, Graph **made) {
    return *made = graph, graph = NULL, recording = 0, fault;
}
int cuGraphGetNodes(Graph *made, void **nodes, size_t *n) { return *n = made->n, fault; }
int cuGraphInstantiateWithFlags(Graph **exec, Graph *made, uint64_t flags) {
    *exec = malloc(sizeof(Graph));
    return **exec = *made, recordings++, fault;
}
int cuGraphDestroy(Graph *made) { return free(made), fault; }
int cuGraphUpload(Graph *exec, void *stream) { return fault; }
int cuGraphExecDestroy(Graph *exec) { return free(exec), fault; }
int cuGraphLaunch(Graph *exec, void *stream) {
    for (size_t i = 0; i < exec->n; ++i) run(&exec->launches[i]);
    return replays++, fault;
}

// The compiler.
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
const char *nvrtcGetErrorString(int code) { return "an error"; }
int nvrtcCreateProgram(void **program) { return *program = (void *)1, 0; }
int nvrtcDestroyProgram(void **program) { return 0; }
int nvrtcCompileProgram(void) { return 0; }
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { return *bytes = 1, 0; }
int nvrtcGetProgramLog(void *program, char *log) { return *log = 0, 0; }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { return *bytes = 4, 0; }
int nvrtcGetCUBIN(void *program, char *code) { return memcpy(code, "none", 4), 0; }

// cuBLASLt: three ways to multiply, told apart by their first number, and as fast as the clock happens to say.
typedef struct { uint64_t numbers[8]; } Way;
typedef struct { Way way; size_t workspace; int status; float waves; int reserved[4]; } Answer;
#define FIRST_WAY 100
#define WAYS 3

size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasLtGetStatusString(int code) { return "CUBLAS_STATUS_NOT_SUPPORTED"; }
int cublasLtCreate(void **handle) { return *handle = (void *)1, 0; }
int cublasLtMatmulDescCreate(void **desc) { return *desc = (void *)1, 0; }
int cublasLtMatmulDescSetAttribute(void) { return 0; }
int cublasLtMatrixLayoutCreate(void **layout) { return *layout = (void *)1, 0; }
int cublasLtMatrixLayoutDestroy(void *layout) { return 0; }
int cublasLtMatmulPreferenceCreate(void **preference) { return *preference = (void *)1, 0; }
int cublasLtMatmulPreferenceSetAttribute(void) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference,
                                   int room, Answer *answers, int *n) {
    for (*n = 0; *n < WAYS && *n < room; ++*n) answers[*n] = (Answer){.way = {{FIRST_WAY + *n}}, .workspace = 1024};
    return 0;
}
int cublasLtMatmulAlgoCheck(void *handle, void *desc, void *a, void *b, void *c, void *d, const Way *way,
                            Answer *answer) {
    *answer = (Answer){.way = *way, .workspace = 1024};
    return getenv("FAKE_GPU_REFUSE") || way->numbers[0] - FIRST_WAY >= WAYS ? 15 : 0;
}
int cublasLtMatmul(void) { return 0; }

// NCCL.
typedef struct { char bytes[128]; } Id;
typedef struct { int n, rank; long sums; } Rank;

int ncclGetVersion(int *version) { return *version = 22803, 0; }
const char *ncclGetErrorString(int code) { return "unhandled cuda error"; }
int ncclGetUniqueId(Id *id) { return *id = (Id){0}, 0; }
int ncclCommInitRank(Rank **rank, int n, Id id, int which) {
    *rank = malloc(sizeof(Rank));
    return **rank = (Rank){n, which, 0}, groups++, 0;
}
int ncclCommAbort(Rank *rank) {
    waiting = 0;
    return free(rank), left++, 0;
}
int ncclAllReduce(const void *from, void *to, size_t n, int numbers, int sum, Rank *rank, void *stream) {
    const char *hang = getenv("FAKE_GPU_HANG");
    if (!hang || ++rank->sums != atol(hang)) return 0;
    return rank->rank == 1 ? 1 : (waiting = 1, 0);
}
int ncclAllGather(const void *from, char *to, size_t bytes, int numbers, Rank *rank, void *stream) {
    for (int i = 0; i < rank->n; ++i) copy(to + i * bytes, from, bytes);
    return 0;
}
