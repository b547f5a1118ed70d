// Attention of many rows of a sequence over its keys and values in the pool, on tensor cores: what prefill does.
//
// One block holds 64 rows of one query head and walks over the keys they may see, 64 at a time; the next keys and
// values are on their way into shared memory while the present ones are multiplied. Each of four warps has 16 rows and
// keeps queries, running maxima, sums and outputs in registers, so warps meet only where a tile of keys changes.
// Limited by the multipliers of mma.sync, about half of what wgmma reaches on Hopper.

typedef unsigned short bf16;

static __device__ __forceinline__ unsigned pack(float lo, float hi) {
    unsigned x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
}
static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ void load_4(unsigned (&x)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at));
}
static __device__ __forceinline__ void load_4_turned(unsigned (&x)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at));
}
// Sixteen bytes from global to shared memory in the background; zeros where `there` is false.
static __device__ __forceinline__ void bring(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}

static __device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define NOTHING (-1.0e30f)
#define ROWS 64
#define KEYS 64

template <int DIM>
static __device__ __forceinline__ void attend_tile(const bf16* __restrict__ qkv, const bf16* __restrict__ keys,
                                                   const bf16* __restrict__ values, const uint4* __restrict__ works,
                                                   const uint2* __restrict__ tiles,
                                                   const unsigned* __restrict__ blocks, bf16* __restrict__ out,
                                                   unsigned n_q, unsigned n_kv, unsigned block_shift, float scale) {
    constexpr int CHUNKS = DIM / 8;              // pieces of sixteen bytes in a row
    constexpr unsigned TILE = KEYS * DIM * 2;    // bytes
    extern __shared__ __align__(128) unsigned char shared[];
    const unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Later tiles see more keys: they start first.
    const uint2 tile = tiles[gridDim.x - 1 - blockIdx.x];
    const uint4 work = works[tile.x];  // first row, rows, start, first block
    const unsigned head = blockIdx.y, kv_head = head / (n_q / n_kv);
    const unsigned width = (n_q + 2 * n_kv) * DIM, mask = (1u << block_shift) - 1;
    const unsigned end = work.z + min(tile.y + ROWS, work.y);  // keys that the last row sees
    const unsigned n_tiles = (end + KEYS - 1) / KEYS;

    auto fetch = [&](unsigned n) {
        const unsigned k = base + (n % 2) * 2 * TILE, v = k + TILE;
#pragma unroll
        for (int i = 0; i < KEYS * CHUNKS / 128; ++i) {
            const unsigned piece = i * 128 + threadIdx.x, row = piece / CHUNKS, chunk = piece % CHUNKS;
            const unsigned token = n * KEYS + row;
            const bool there = token < end;
            const unsigned block = there ? blocks[work.w + (token >> block_shift)] : 0;
            const size_t at = ((((size_t)block * n_kv + kv_head) << block_shift) + (token & mask)) * DIM + chunk * 8;
            const unsigned to = (row * CHUNKS + (chunk ^ (row % 8))) * 16;
            bring(k + to, keys + (there ? at : 0), there);
            bring(v + to, values + (there ? at : 0), there);
        }
        asm volatile("cp.async.commit_group;");
    };
    fetch(0);

    // This thread's rows within the tile, and their queries, as the multiplication wants them.
    const unsigned r0 = warp * 16 + lane / 4, r1 = r0 + 8;
    const bool in0 = tile.y + r0 < work.y, in1 = tile.y + r1 < work.y;
    unsigned q[DIM / 16][4];
    {
        const bf16* q0 = qkv + (size_t)(work.x + tile.y + (in0 ? r0 : 0)) * width + head * DIM + lane % 4 * 2;
        const bf16* q1 = qkv + (size_t)(work.x + tile.y + (in1 ? r1 : 0)) * width + head * DIM + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < DIM / 16; ++i) {
            q[i][0] = *reinterpret_cast<const unsigned*>(q0 + i * 16);
            q[i][1] = *reinterpret_cast<const unsigned*>(q1 + i * 16);
            q[i][2] = *reinterpret_cast<const unsigned*>(q0 + i * 16 + 8);
            q[i][3] = *reinterpret_cast<const unsigned*>(q1 + i * 16 + 8);
        }
    }
    float acc[DIM / 8][4];
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
    float most0 = NOTHING, most1 = NOTHING, sum0 = 0.0f, sum1 = 0.0f;
    const unsigned p0 = work.z + tile.y + r0, p1 = p0 + 8;  // positions

    for (unsigned n = 0; n < n_tiles; ++n) {
        if (n + 1 < n_tiles) {
            fetch(n + 1);
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();
        const unsigned k = base + (n % 2) * 2 * TILE, v = k + TILE;
        float s[KEYS / 8][4];
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            // Four 8 x 8 pieces: keys 0-7 and 8-15, each with dimensions 0-7 and 8-15.
            const unsigned row = j * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
            for (int i = 0; i < DIM / 16; ++i) {
                const unsigned chunk = i * 2 + lane / 8 % 2;
                unsigned b[4];
                load_4(b, k + (row * CHUNKS + (chunk ^ (row % 8))) * 16);
                multiply(s[2 * j], q[i], b[0], b[1]);
                multiply(s[2 * j + 1], q[i], b[2], b[3]);
            }
        }
        const bool edge = (n + 1) * KEYS > work.z + tile.y + 1;
        float top0 = most0, top1 = most1;
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const unsigned token = n * KEYS + j * 8 + lane % 4 * 2 + c;
                if (edge && token > p0) s[j][c] = NOTHING;
                if (edge && token > p1) s[j][2 + c] = NOTHING;
                top0 = fmaxf(top0, s[j][c]);
                top1 = fmaxf(top1, s[j][2 + c]);
            }
        }
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, d));
            top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, d));
        }
        // Scores are scaled on their way into the exponential: one operation instead of two.
        const float from0 = top0 * scale, from1 = top1 * scale;
        const float shrink0 = power_of_two(most0 * scale - from0), shrink1 = power_of_two(most1 * scale - from1);
        most0 = top0, most1 = top1;
        sum0 *= shrink0, sum1 *= shrink1;
#pragma unroll
        for (int i = 0; i < DIM / 8; ++i) {
            acc[i][0] *= shrink0, acc[i][1] *= shrink0;
            acc[i][2] *= shrink1, acc[i][3] *= shrink1;
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                s[j][c] = power_of_two(s[j][c] * scale - from0);
                s[j][2 + c] = power_of_two(s[j][2 + c] * scale - from1);
                sum0 += s[j][c];
                sum1 += s[j][2 + c];
            }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            const unsigned p[4] = {pack(s[2 * j][0], s[2 * j][1]), pack(s[2 * j][2], s[2 * j][3]),
                                   pack(s[2 * j + 1][0], s[2 * j + 1][1]), pack(s[2 * j + 1][2], s[2 * j + 1][3])};
            // Four 8 x 8 pieces: keys 0-7 and 8-15, each with dimensions 0-7 and 8-15, turned.
            const unsigned row = j * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
            for (int i = 0; i < DIM / 16; ++i) {
                const unsigned chunk = i * 2 + lane / 16;
                unsigned b[4];
                load_4_turned(b, v + (row * CHUNKS + (chunk ^ (row % 8))) * 16);
                multiply(acc[2 * i], p, b[0], b[1]);
                multiply(acc[2 * i + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        sum0 += __shfl_xor_sync(~0u, sum0, d);
        sum1 += __shfl_xor_sync(~0u, sum1, d);
    }
    const float by0 = 1.0f / sum0, by1 = 1.0f / sum1;
    bf16* o0 = out + ((size_t)(work.x + tile.y + r0) * n_q + head) * DIM + lane % 4 * 2;
    bf16* o1 = o0 + (size_t)8 * n_q * DIM;
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) {
        if (in0) *reinterpret_cast<unsigned*>(o0 + i * 8) = pack(acc[i][0] * by0, acc[i][1] * by0);
        if (in1) *reinterpret_cast<unsigned*>(o1 + i * 8) = pack(acc[i][2] * by1, acc[i][3] * by1);
    }
}

#define TILES(DIM)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        attend_tiles_##DIM(const bf16* qkv, const bf16* keys, const bf16* values, const uint4* works,                 \
                           const uint2* tiles, const unsigned* blocks, bf16* out, unsigned n_q, unsigned n_kv,        \
                           unsigned block_shift, float scale) {                                                       \
        attend_tile<DIM>(qkv, keys, values, works, tiles, blocks, out, n_q, n_kv, block_shift, scale);                \
    }
TILES(64)
TILES(128)
