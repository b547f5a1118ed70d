// Attention of single rows over their sequences in the pool: what decoding does. Limited by the bytes of keys and
// values, which are read once for all query heads that share them (four at a time).
//
// Eight (or four) lanes hold one token's head in pieces of sixteen bytes, so a warp works on four (or eight) tokens at
// a time and a score needs few exchanges between lanes. Each such team keeps its own running maximum and sum; teams are
// merged once at the end, and parts of a long context once more by `merge_parts`. The order of all sums is fixed.

typedef unsigned short bf16;

static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
static __device__ __forceinline__ float low(unsigned x) { return __uint_as_float(x << 16); }
static __device__ __forceinline__ float high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
static __device__ __forceinline__ bf16 narrow(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// Below every score; finite, so that differences are numbers.
#define NOTHING (-1.0e30f)
#define HEADS 4   // query heads that share a pass over keys and values
#define WARPS 4
#define AHEAD 2   // tokens of a team whose keys and values are under way together
#define PART 64   // fewest tokens of a part of a context

// Parts that a context of `n` tokens is cut into, of at most `most`.
static __device__ __forceinline__ unsigned parts_of(unsigned n, unsigned most) { return min((n + PART - 1) / PART, most); }

template <int DIM>
static __device__ __forceinline__ void attend_single(const bf16* __restrict__ qkv, const bf16* __restrict__ keys,
                                                     const bf16* __restrict__ values,
                                                     const uint4* __restrict__ works,
                                                     const unsigned* __restrict__ blocks, bf16* __restrict__ out,
                                                     float* __restrict__ parts, unsigned n_q, unsigned n_kv,
                                                     unsigned block_shift, float scale) {
    constexpr int LANES = DIM / 16, TEAMS = 32 / LANES, HALF = DIM / 2;
    chain();
    const uint4 work = works[blockIdx.x];  // first row, rows, start, first block
    const unsigned group = n_q / n_kv, passes = (group + HEADS - 1) / HEADS;
    const unsigned kv_head = blockIdx.y / passes, first = blockIdx.y % passes * HEADS;
    const unsigned heads = min(group - first, (unsigned)HEADS), q_head = kv_head * group + first;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % LANES, team = threadIdx.x % 32 / LANES;
    const unsigned n = work.z + 1, splits = parts_of(n, gridDim.z);
    if (blockIdx.z >= splits) return;
    const unsigned each = (n + splits - 1) / splits, begin = blockIdx.z * each, end = min(begin + each, n);

    float q[HEADS][16];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        const bf16* from = qkv + ((size_t)work.x * (n_q + 2 * n_kv) + q_head + (h < heads ? h : 0)) * DIM;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            q[h][i] = widen(from[lane * 8 + i]) * scale;
            q[h][8 + i] = widen(from[HALF + lane * 8 + i]) * scale;
        }
    }
    float most[HEADS], sum[HEADS], acc[HEADS][16];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        most[h] = NOTHING, sum[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) acc[h][i] = 0.0f;
    }
    const unsigned mask = (1u << block_shift) - 1;
    for (unsigned base = begin + warp * TEAMS + team; base - team < end; base += WARPS * TEAMS * AHEAD) {
        size_t at[AHEAD];
        bool there[AHEAD];
        uint4 k[AHEAD][2], v[AHEAD][2];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const unsigned token = base + u * WARPS * TEAMS;
            there[u] = token < end;
            const unsigned block = there[u] ? blocks[work.w + (token >> block_shift)] : 0;
            at[u] = ((((size_t)block * n_kv + kv_head) << block_shift) + (token & mask)) * DIM + lane * 8;
            k[u][0] = there[u] ? *reinterpret_cast<const uint4*>(keys + at[u]) : make_uint4(0, 0, 0, 0);
            k[u][1] = there[u] ? *reinterpret_cast<const uint4*>(keys + at[u] + HALF) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            v[u][0] = there[u] ? *reinterpret_cast<const uint4*>(values + at[u]) : make_uint4(0, 0, 0, 0);
            v[u][1] = there[u] ? *reinterpret_cast<const uint4*>(values + at[u] + HALF) : make_uint4(0, 0, 0, 0);
        }
        float p[AHEAD][HEADS];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const unsigned bits[8] = {k[u][0].x, k[u][0].y, k[u][0].z, k[u][0].w,
                                      k[u][1].x, k[u][1].y, k[u][1].z, k[u][1].w};
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) dot += q[h][2 * i] * low(bits[i]) + q[h][2 * i + 1] * high(bits[i]);
#pragma unroll
                for (int d = LANES / 2; d; d /= 2) dot += __shfl_xor_sync(~0u, dot, d);
                p[u][h] = there[u] ? dot : NOTHING;
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float now = most[h];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) now = fmaxf(now, p[u][h]);
            const float shrink = power_of_two(most[h] - now);
            most[h] = now, sum[h] *= shrink;
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                p[u][h] = there[u] ? power_of_two(p[u][h] - now) : 0.0f;
                sum[h] += p[u][h];
            }
#pragma unroll
            for (int i = 0; i < 16; ++i) acc[h][i] *= shrink;
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const unsigned bits[8] = {v[u][0].x, v[u][0].y, v[u][0].z, v[u][0].w,
                                      v[u][1].x, v[u][1].y, v[u][1].z, v[u][1].w};
#pragma unroll
            for (int h = 0; h < HEADS; ++h)
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    acc[h][2 * i] += p[u][h] * low(bits[i]);
                    acc[h][2 * i + 1] += p[u][h] * high(bits[i]);
                }
        }
    }

    __shared__ float merged[WARPS][HEADS][DIM];
    __shared__ float tops[WARPS][HEADS], sums[WARPS][HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float top = most[h];
#pragma unroll
        for (int d = LANES; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float shrink = power_of_two(most[h] - top);
        float total = sum[h] * shrink;
#pragma unroll
        for (int d = LANES; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float x = acc[h][i] * shrink;
#pragma unroll
            for (int d = LANES; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
            if (team == 0) merged[warp][h][(i < 8 ? 0 : HALF) + lane * 8 + i % 8] = x;
        }
        if (threadIdx.x % 32 == 0) tops[warp][h] = top, sums[warp][h] = total;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < heads * DIM; i += WARPS * 32) {
        const unsigned h = i / DIM, d = i % DIM;
        float top = NOTHING;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w][h]);
        float x = 0.0f, total = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            const float shrink = power_of_two(tops[w][h] - top);
            x += merged[w][h][d] * shrink;
            total += sums[w][h] * shrink;
        }
        if (splits == 1) {
            out[((size_t)work.x * n_q + q_head + h) * DIM + d] = narrow(x / total);
        } else {
            float* part = parts + (((size_t)blockIdx.x * n_q + q_head + h) * gridDim.z + blockIdx.z) * (DIM + 2);
            part[d] = x;
            if (d == 0) part[DIM] = top, part[DIM + 1] = total;
        }
    }
}

#define SINGLE(DIM)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                          \
        attend_single_##DIM(const bf16* qkv, const bf16* keys, const bf16* values, const uint4* works,                \
                            const unsigned* blocks, bf16* out, float* parts, unsigned n_q, unsigned n_kv,             \
                            unsigned block_shift, float scale) {                                                      \
        attend_single<DIM>(qkv, keys, values, works, blocks, out, parts, n_q, n_kv, block_shift, scale);              \
    }
SINGLE(64)
SINGLE(128)

// One block a work and query head: the parts of its context become one.
extern "C" __global__ void __launch_bounds__(128) merge_parts(const float* __restrict__ parts,
                                                               const uint4* __restrict__ works,
                                                               bf16* __restrict__ out, unsigned n_q, unsigned dim,
                                                               unsigned most) {
    chain();
    const float* part = parts + ((size_t)blockIdx.x * n_q + blockIdx.y) * most * (dim + 2);
    const unsigned splits = parts_of(works[blockIdx.x].z + 1, most);
    if (splits == 1) return;  // written whole
    // Each warp for itself: a lane has a part, so that all of them are read at once.
    __shared__ float factors[4][32];
    const unsigned lane = threadIdx.x % 32;
    const bool there = lane < splits;
    const float own = there ? part[lane * (dim + 2) + dim] : NOTHING;
    float total = there ? part[lane * (dim + 2) + dim + 1] : 0.0f, top = own;
    for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    const float factor = there ? power_of_two(own - top) : 0.0f;
    total *= factor;
    for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(~0u, total, d);
    factors[threadIdx.x / 32][lane] = factor;
    __syncwarp();
    for (unsigned d = threadIdx.x; d < dim; d += blockDim.x) {
        float x = 0.0f;
#pragma unroll 8
        for (unsigned s = 0; s < splits; ++s) x += part[s * (dim + 2) + d] * factors[threadIdx.x / 32][s];
        out[((size_t)works[blockIdx.x].x * n_q + blockIdx.y) * dim + d] = narrow(x / total);
    }
}

// Any head size, any row: one block a row and query head, one warp every fourth token. For shapes that the other
// kernels do not have; slow and simple.
extern "C" __global__ void __launch_bounds__(128)
    attend_any(const bf16* __restrict__ qkv, const bf16* __restrict__ keys, const bf16* __restrict__ values,
               const uint4* __restrict__ works, const unsigned* __restrict__ row_works,
               const unsigned* __restrict__ positions, const unsigned* __restrict__ blocks, bf16* __restrict__ out,
               unsigned n_q, unsigned n_kv, unsigned dim, unsigned block_shift, float scale) {
    extern __shared__ float shared[];  // the query, then a sum of values for each warp
    __shared__ float tops[4], sums[4];
    const unsigned row = blockIdx.x, head = blockIdx.y, kv_head = head / (n_q / n_kv);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint4 work = works[row_works[row]];
    const bf16* from = qkv + ((size_t)row * (n_q + 2 * n_kv) + head) * dim;
    float* mine = shared + (1 + warp) * dim;
    for (unsigned i = threadIdx.x; i < dim; i += 128) shared[i] = widen(from[i]) * scale;
    for (unsigned i = lane; i < dim; i += 32) mine[i] = 0.0f;
    __syncthreads();
    float top = NOTHING, total = 0.0f;
    for (unsigned token = warp; token <= positions[row]; token += 4) {
        const unsigned block = blocks[work.w + (token >> block_shift)];
        const size_t at =
            ((((size_t)block * n_kv + kv_head) << block_shift) + (token & ((1u << block_shift) - 1))) * dim;
        float dot = 0.0f;
        for (unsigned i = lane; i < dim; i += 32) dot += shared[i] * widen(keys[at + i]);
        for (int d = 16; d; d >>= 1) dot += __shfl_xor_sync(~0u, dot, d);
        const float now = fmaxf(top, dot), shrink = power_of_two(top - now), p = power_of_two(dot - now);
        total = total * shrink + p;
        top = now;
        for (unsigned i = lane; i < dim; i += 32) mine[i] = mine[i] * shrink + p * widen(values[at + i]);
    }
    if (lane == 0) tops[warp] = top, sums[warp] = total;
    __syncthreads();
    float most = NOTHING, all = 0.0f;
    for (int w = 0; w < 4; ++w) most = fmaxf(most, tops[w]);
    for (int w = 0; w < 4; ++w) all += sums[w] * power_of_two(tops[w] - most);
    for (unsigned i = threadIdx.x; i < dim; i += 128) {
        float x = 0.0f;
        for (int w = 0; w < 4; ++w) x += shared[(1 + w) * dim + i] * power_of_two(tops[w] - most);
        out[((size_t)row * n_q + head) * dim + i] = narrow(x / all);
    }
}
