// Rotary position embedding, and keys and values on their way into the pool.

typedef unsigned short bf16;

static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
static __device__ __forceinline__ bf16 narrow(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// A kernel of a chain may begin before the one it depends on is done: it says when its own successor may begin, and waits
// before it touches what others wrote.
static __device__ __forceinline__ void chain() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Cosine and sine of every row's angles, once a step. The angle is a product in single precision, as checkpoints were
// trained with it; its sine and cosine are right to single precision at any position.
extern "C" __global__ void __launch_bounds__(256) turns(float2* __restrict__ turn, const float* __restrict__ inv_freq,
                                                         const unsigned* __restrict__ positions, unsigned half) {
    chain();
    for (unsigned i = threadIdx.x; i < half; i += blockDim.x) {
        float2 t;
        sincosf(__fmul_rn((float)positions[blockIdx.x], inv_freq[i]), &t.y, &t.x);
        turn[(size_t)blockIdx.x * half + i] = t;
    }
}

// Blocks of y share a row of queries, keys and values. Queries are rotated in place; keys are rotated into the row's
// place in the pool, values copied there. Pairs are the two halves of a head.
extern "C" __global__ void __launch_bounds__(256)
    rope_write(bf16* __restrict__ qkv, bf16* __restrict__ keys, bf16* __restrict__ values,
               const float2* __restrict__ turn, const unsigned* __restrict__ places, unsigned n_q, unsigned n_kv,
               unsigned dim, unsigned block_tokens) {
    chain();
    const unsigned half = dim / 2, row = blockIdx.x, n_pairs = (n_q + n_kv) * half;
    bf16* q = qkv + (size_t)row * (n_q + 2 * n_kv) * dim;
    const bf16* v = q + (n_q + n_kv) * dim;
    const unsigned place = places[row], block = place / block_tokens, offset = place % block_tokens;
    for (unsigned i = blockIdx.y * 256 + threadIdx.x; i < n_pairs + n_kv * half; i += gridDim.y * 256) {
        const unsigned head = i / half, pair = i % half;
        if (i >= n_pairs) {
            const size_t to = ((size_t)(block * n_kv + head - n_q - n_kv) * block_tokens + offset) * dim + pair;
            const bf16* from = v + (head - n_q - n_kv) * dim + pair;
            values[to] = from[0];
            values[to + half] = from[half];
            continue;
        }
        const float2 t = turn[(size_t)row * half + pair];
        const bf16* from = q + head * dim + pair;
        const float a = widen(from[0]), b = widen(from[half]);
        bf16* to = q + head * dim + pair;
        if (head >= n_q) to = keys + ((size_t)(block * n_kv + head - n_q) * block_tokens + offset) * dim + pair;
        to[0] = narrow(a * t.x - b * t.y);
        to[half] = narrow(b * t.x + a * t.y);
    }
}
