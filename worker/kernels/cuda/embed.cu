// Rows of the embedding table become the residual stream.

typedef unsigned short bf16;

static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }

// A kernel of a chain may begin before the one it depends on is done: it says when its own successor may begin, and waits
// before it touches what others wrote.
static __device__ __forceinline__ void chain() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// One block a row. An id whose highest bit is set names the slot whose last sampled token is meant. `table` holds tokens
// `first .. first + n`; rows of other tokens become zeros, so that the sum over ranks is the embedding.
extern "C" __global__ void __launch_bounds__(256) embed(float* __restrict__ residual, const bf16* __restrict__ table,
                                                         const unsigned* __restrict__ tokens,
                                                         const unsigned* __restrict__ last, unsigned width,
                                                         unsigned first, unsigned n) {
    chain();
    const unsigned id = tokens[blockIdx.x];
    const unsigned token = (id >> 31 ? last[id & 0x7fffffffu] : id) - first;  // wraps far above n before the first
    float* to = residual + (size_t)blockIdx.x * width;
    const bf16* from = table + (size_t)token * width;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) to[i] = token < n ? widen(from[i]) : 0.0f;
}
