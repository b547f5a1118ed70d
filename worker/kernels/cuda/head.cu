// From the last norm to a token: the rows whose logits are wanted, the likeliest token of each, and the fingerprint of
// the residual stream by which ranks see that they agree.

typedef unsigned short bf16;
typedef unsigned long long u64;

// A kernel of a chain may begin before the one it depends on is done: it says when its own successor may begin, and waits
// before it touches what others wrote.
static __device__ __forceinline__ void chain() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// One block an ask: its row, sixteen bytes at a time where the width allows.
extern "C" __global__ void __launch_bounds__(256) gather_rows(const bf16* __restrict__ from, bf16* __restrict__ to,
                                                               const unsigned* __restrict__ rows, unsigned width) {
    chain();
    const bf16* row = from + (size_t)rows[blockIdx.x] * width;
    if (width % 8 == 0) {
        uint4* out = reinterpret_cast<uint4*>(to + (size_t)blockIdx.x * width);
        for (unsigned i = threadIdx.x; i < width / 8; i += blockDim.x) out[i] = reinterpret_cast<const uint4*>(row)[i];
        return;
    }
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) to[(size_t)blockIdx.x * width + i] = row[i];
}

// A logit and its token as one number whose order is that of selection: larger logit first, then lower token.
// 0 is what nothing is below: no token, or a logit that is not a number.
static __device__ __forceinline__ u64 rank(float logit, unsigned token) {
    const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    const unsigned order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)order << 32 | (unsigned)~token;
}

// Not-a-number wins, so that it is seen.
static __device__ __forceinline__ u64 better(u64 a, u64 b) { return a > b ? a : b; }

// Blocks of x share a row of logits; each leaves its best in `best[row][block]`. `first` is the rank's first token.
extern "C" __global__ void __launch_bounds__(256) argmax_parts(const float* __restrict__ logits, unsigned width,
                                                                unsigned first, u64* __restrict__ best) {
    chain();
    const float* row = logits + (size_t)blockIdx.y * width;
    u64 mine = 0;
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < width; i += gridDim.x * 256) {
        const float x = row[i];
        // Not a number, or plus infinity: no choice can be made.
        mine = better(mine, x < __int_as_float(0x7f800000) ? rank(x, first + i) : ~0ull);
    }
    for (int n = 16; n; n >>= 1) mine = better(mine, __shfl_xor_sync(~0u, mine, n));
    __shared__ u64 warps[8];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; ++i) mine = better(mine, warps[i]);
        best[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = mine;
    }
}

// One warp a row: the best of its `n` parts, which lie `stride` apart. `last`, if there is one, keeps the token for the
// row's slot; a slot of all ones is none.
extern "C" __global__ void __launch_bounds__(32) argmax_merge(const u64* __restrict__ parts, unsigned n,
                                                               unsigned stride, unsigned row_stride,
                                                               u64* __restrict__ best,
                                                               const unsigned* __restrict__ slots,
                                                               unsigned* __restrict__ last) {
    chain();
    const u64* row = parts + (size_t)blockIdx.x * row_stride;
    u64 mine = 0;
    for (unsigned i = threadIdx.x; i < n; i += 32) mine = better(mine, row[(size_t)i * stride]);
    for (int d = 16; d; d >>= 1) mine = better(mine, __shfl_xor_sync(~0u, mine, d));
    if (threadIdx.x != 0) return;
    best[blockIdx.x] = mine;
    if (last && slots[blockIdx.x] != ~0u) last[slots[blockIdx.x]] = ~(unsigned)mine;
}

static __device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Adds the hashes of all numbers, each with its place, to `sum`: an order-free sum of whole numbers, so the result does
// not depend on which block comes first.
extern "C" __global__ void __launch_bounds__(256) fingerprint(const float* __restrict__ from, u64 n,
                                                               u64* __restrict__ sum) {
    u64 mine = 0;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256)
        mine += mix(i << 32 | __float_as_uint(from[i]));
    for (int d = 16; d; d >>= 1) mine += __shfl_xor_sync(~0u, mine, d);
    if (threadIdx.x % 32 == 0) atomicAdd(sum, mine);
}
