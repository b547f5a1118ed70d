// Attention of single rows over their sequences in the pool: what decoding does. Limited by the bytes of keys and
// values, which are read once for all query heads that share them (eight at a time).
//
// A warp works on sixteen tokens at a time, on tensor cores, whose operands are loaded as they are used: a thread's
// sixteen bytes of a key are eight numbers in a line, and which of them meets which step of a multiplication does not
// matter as long as queries agree. Queries times keys leaves a thread with the scores of one head and of the tokens whose
// values it has as well, so weights go on to the next multiplication without a move. Each warp keeps its own running
// maximum and sum; warps are merged once at the end, and parts of a long context once more by `merge_parts`. The order of
// all sums is fixed.

typedef unsigned short bf16;

static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
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
#define HEADS 8   // query heads that share a pass over keys and values
#define WARPS 4
#define TILE 16   // tokens that a warp works on at a time
#define PART 64   // fewest tokens of a part of a context
#if __CUDA_ARCH__ >= 1000
#define RESIDENT 3  // blocks that a multiprocessor has at a time: as many as there are registers for
#else
#define RESIDENT 4
#endif

// Parts that a context of `n` tokens is cut into, of at most `most`.
static __device__ __forceinline__ unsigned parts_of(unsigned n, unsigned most) { return min((n + PART - 1) / PART, most); }

static __device__ __forceinline__ unsigned pack(float lo, float hi) {
    unsigned x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
}
// c[16, 8] += a[16, 16] x b[16, 8].
static __device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Read once: not kept where others' data would have to go.
static __device__ __forceinline__ uint4 stream(const bf16* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// A lane belongs to head and token (or piece of a value) lane / 4, and to piece of a key (or pair of tokens) lane % 4.
template <int DIM>
static __device__ __forceinline__ void attend_single(const bf16* __restrict__ qkv, const bf16* __restrict__ keys,
                                                     const bf16* __restrict__ values,
                                                     const uint4* __restrict__ works,
                                                     const unsigned* __restrict__ blocks, bf16* __restrict__ out,
                                                     float* __restrict__ parts, unsigned n_q, unsigned n_kv,
                                                     unsigned block_shift, float scale) {
    constexpr int KEY = DIM / 32, VALUE = DIM / 64;  // pieces of eight numbers that a lane has of a key and of a value
    chain();
    const uint4 work = works[blockIdx.x];  // first row, rows, start, first block
    const unsigned group = n_q / n_kv, passes = (group + HEADS - 1) / HEADS;
    const unsigned kv_head = blockIdx.y / passes, first = blockIdx.y % passes * HEADS;
    const unsigned heads = min(group - first, (unsigned)HEADS), q_head = kv_head * group + first;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, big = lane / 4, small = lane % 4;
    const unsigned n = work.z + 1, splits = parts_of(n, gridDim.z);
    if (blockIdx.z >= splits) return;
    // Whole tiles: the last parts of a context may be empty.
    const unsigned each = ((n + splits - 1) / splits + TILE - 1) / TILE * TILE;
    const unsigned begin = blockIdx.z * each, end = min(begin + each, n);

    __shared__ float merged[WARPS][HEADS][DIM];
    __shared__ float tops[WARPS][HEADS], sums[WARPS][HEADS];
    // What there are no registers for in between: where results go, and the queries, which all warps share.
    __shared__ size_t to;
    __shared__ unsigned to_heads, to_splits;
    if (threadIdx.x == 0) {
        to_heads = heads, to_splits = splits;
        to = splits == 1 ? ((size_t)work.x * n_q + q_head) * DIM
                         : (((size_t)blockIdx.x * n_q + q_head) * gridDim.z + blockIdx.z) * (DIM + 2);
    }
    __shared__ uint4 queries[KEY][32];
    if (warp < KEY) {
        const bf16* from = qkv + ((size_t)work.x * (n_q + 2 * n_kv) + q_head + big) * DIM + small * 8 + warp * 32;
        queries[warp][lane] = big < heads ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    const unsigned own_queries = (unsigned)__cvta_generic_to_shared(&queries[0][lane]);
    float acc[VALUE * 4][4], most = NOTHING, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUE * 4; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;

    // Where the lane's token of a tile is, as a row of the pool. Beyond the end is the last token again.
    const auto find = [&](unsigned base) {
        const unsigned token = min(base + lane % TILE, end - 1);
        const unsigned block = blocks[work.w + (token >> block_shift)];
        return ((block * n_kv + kv_head) << block_shift) + (token & ((1u << block_shift) - 1));
    };
    unsigned base = begin + warp * TILE, rows = 0;
    uint4 k[2][KEY], v[4][VALUE];
    const auto fetch_keys = [&](int t) {
        const bf16* key = keys + (size_t)__shfl_sync(~0u, rows, t * 8 + big) * DIM + small * 8;
#pragma unroll
        for (int i = 0; i < KEY; ++i) k[t][i] = stream(key + i * 32);
    };
    if (base < end) {
        rows = find(base);
        fetch_keys(0);
        fetch_keys(1);
    }
#pragma unroll 1
    while (base < end) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const unsigned row = __shfl_sync(~0u, rows, t / 2 * 8 + small * 2 + t % 2);
            const bf16* value = values + (size_t)row * DIM + big * 8;
#pragma unroll
            for (int i = 0; i < VALUE; ++i) v[t][i] = stream(value + i * 64);
        }
        const unsigned next = base + WARPS * TILE;
        if (next < end) rows = find(next);
        float s[2][4] = {};
#pragma unroll
        for (int i = 0; i < KEY; ++i) {
            uint4 q;
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                         : "r"(own_queries + i * (unsigned)sizeof(queries[0])));
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                multiply(s[t], q.x, 0, q.y, 0, k[t][i].x, k[t][i].y);
                multiply(s[t], q.z, 0, q.w, 0, k[t][i].z, k[t][i].w);
            }
        }
        if (next < end) fetch_keys(0);
        float p[4], now = most;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const unsigned token = base + t / 2 * 8 + small * 2 + t % 2;
            p[t] = token < end ? s[t / 2][t % 2] * scale : NOTHING;
            now = fmaxf(now, p[t]);
        }
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        if (__any_sync(~0u, now > most)) {
            const float shrink = power_of_two(most - now);
            sum *= shrink;
            // Sums belong to other heads than scores do.
            const float by[2] = {__shfl_sync(~0u, shrink, small * 8), __shfl_sync(~0u, shrink, small * 8 + 4)};
#pragma unroll
            for (int i = 0; i < VALUE * 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[i][j] *= by[j % 2];
        }
        most = now;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            p[t] = power_of_two(p[t] - now);
            sum += p[t];
        }
        const unsigned weights[2] = {pack(p[0], p[1]), pack(p[2], p[3])};
#pragma unroll
        for (int i = 0; i < VALUE; ++i) {
            const unsigned word[4][4] = {{v[0][i].x, v[0][i].y, v[0][i].z, v[0][i].w},
                                         {v[1][i].x, v[1][i].y, v[1][i].z, v[1][i].w},
                                         {v[2][i].x, v[2][i].y, v[2][i].z, v[2][i].w},
                                         {v[3][i].x, v[3][i].y, v[3][i].z, v[3][i].w}};
#pragma unroll
            for (int w = 0; w < 4; ++w)  // two numbers of each of the four tokens
                multiply(acc[i * 4 + w], __byte_perm(word[0][w], word[1][w], 0x5410),
                         __byte_perm(word[0][w], word[1][w], 0x7632), __byte_perm(word[2][w], word[3][w], 0x5410),
                         __byte_perm(word[2][w], word[3][w], 0x7632), weights[0], weights[1]);
            if (i == 0 && next < end) fetch_keys(1);  // where the first values were
        }
        base = next;
    }

    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (small == 0) tops[warp][big] = most, sums[warp][big] = sum;
#pragma unroll
    for (int i = 0; i < VALUE * 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            merged[warp][small * 2 + j % 2][(i / 4 * 8 + big) * 8 + i % 4 * 2 + j / 2] = acc[i][j];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < to_heads * DIM; i += WARPS * 32) {
        const unsigned h = i / DIM, d = i % DIM;
        float top = NOTHING;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w][h]);
        float x = 0.0f, total = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            const float shrink = power_of_two(tops[w][h] - top);
            x += merged[w][h][d] * shrink;
            total += sums[w][h] * shrink;
        }
        if (to_splits == 1) {
            out[to + i] = narrow(x / total);
        } else {
            float* part = parts + to + (size_t)h * gridDim.z * (DIM + 2);
            part[d] = x;
            if (d == 0) part[DIM] = top, part[DIM + 1] = total;
        }
    }
}

#define SINGLE(DIM)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)                                                \
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
