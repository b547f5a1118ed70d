// Attention of many rows of a sequence over its keys and values in the pool, for Hopper alone: wgmma fed by the copy
// engine. `prefill.cu` is its portable twin.
//
// A block holds 64 rows of two query heads that share keys and values, a warpgroup each, and walks over the keys that the
// rows may see, 128 at a time. A third warpgroup does nothing but start copies: a box of a pool's block and half a head
// each, laid out by the copy engine in rows of 128 bytes whose 16-byte pieces are swizzled, as wgmma reads them. Keys and
// values have two stages each. A warpgroup multiplies queries by the next keys while its last weights are multiplied by
// their values, and takes exponentials meanwhile. Limited by the exponentials and by wgmma's rate.
//
// Keys beyond the last are whatever the pool holds, which is finite: their weights are zero.

typedef unsigned short bf16;
typedef unsigned long long u64;

#define ROWS 64
#define KEYS 128
#define DIM 128
#define STAGES 2
#define NOTHING (-1.0e30f)
#define Q_BYTES (ROWS * DIM * 2)
#define TILE_BYTES (KEYS * DIM * 2)

static __device__ __forceinline__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// A matrix in shared memory whose rows of 128 bytes are swizzled. `lead` is the distance of pieces of 64 numbers along
// the contiguous dimension (where a multiplication needs several), 1024 bytes that of groups of eight rows.
static __device__ __forceinline__ u64 matrix(unsigned at, unsigned lead) {
    return (u64)(at >> 4 & 0x3fff) | (u64)(lead >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

static __device__ __forceinline__ unsigned pack(float lo, float hi) {
    unsigned x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
}
static __device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ void begin_multiplications() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
static __device__ __forceinline__ void await_multiplications() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from moving uses of results before the wait.
static __device__ __forceinline__ void settled(float (&x)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define SUMS(d)                                                                                                      \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),       \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),        \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),       \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),       \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),       \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),       \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define SUM_NAMES                                                                                                    \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
    "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
    "%58,%59,%60,%61,%62,%63}"

// d[64, 128] = (or +=) a[64, 16] x b[128, 16]^T, both in shared memory.
static __device__ __forceinline__ void multiply(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUM_NAMES ", %64, %65, p, 1, 1, 0, 0;\n}\n"
                 : SUMS(d)
                 : "l"(a), "l"(b), "r"(add));
}
// d[64, 128] += a[64, 16] x b[16, 128], a in registers, rows of b contiguous in shared memory.
static __device__ __forceinline__ void multiply(float (&d)[64], unsigned a0, unsigned a1, unsigned a2, unsigned a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUM_NAMES
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                 : SUMS(d)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

static __device__ __forceinline__ void barrier_init(unsigned bar, unsigned n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(n) : "memory");
}
static __device__ __forceinline__ void barrier_expect(unsigned bar, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void barrier_wait(unsigned bar, unsigned phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra GONE;\nbra AGAIN;\nGONE:\n}\n" ::"r"(bar),
                 "r"(phase)
                 : "memory");
}
// A box of the pool, from column x and row y on.
static __device__ __forceinline__ void copy_box(unsigned to, const void* map, int x, int y, unsigned bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(bar)
                 : "memory");
}

struct Barriers {
    u64 keys_full[STAGES], keys_free[STAGES], values_full[STAGES], values_free[STAGES];
};

// The warpgroup that starts copies; one warp does it. `maps` describe the layer's keys and values.
static __device__ __forceinline__ void bring(const unsigned char* maps, const unsigned* __restrict__ blocks, uint4 work,
                                             unsigned end, unsigned n_tiles, unsigned kv_head, unsigned n_kv,
                                             unsigned block_shift, unsigned k, unsigned v, Barriers* bars) {
    if (threadIdx.x >= 32) return;
    const unsigned box_shift = min(block_shift, 7u), boxes = KEYS >> box_shift;  // of a tile and half a head
    for (unsigned n = 0; n < n_tiles; ++n) {
        const unsigned stage = n % STAGES, phase = n / STAGES % 2;
        for (int what = 0; what < 2; ++what) {
            u64* full = what ? bars->values_full : bars->keys_full;
            u64* free = what ? bars->values_free : bars->keys_free;
            barrier_wait(address(&free[stage]), phase ^ 1);
            const unsigned bar = address(&full[stage]), to = (what ? v : k) + stage * TILE_BYTES;
            if (threadIdx.x == 0) barrier_expect(bar, TILE_BYTES);
            __syncwarp();
            for (unsigned i = threadIdx.x; i < 2 * boxes; i += 32) {
                const unsigned half = i / boxes, box = i % boxes;
                const unsigned token = min(n * KEYS + (box << box_shift), end - 1) >> box_shift << box_shift;
                const unsigned block = blocks[work.w + (token >> block_shift)];
                const unsigned row = ((block * n_kv + kv_head) << block_shift) + (token & ((1u << block_shift) - 1));
                copy_box(to + half * (TILE_BYTES / 2) + (box << box_shift) * 128, maps + what * 128, half * 64, row, bar);
            }
        }
    }
}

// Masks, takes exponentials, and gives the factor by which what was summed so far shrinks.
static __device__ __forceinline__ void soften(float (&s)[64], unsigned first, unsigned p0, bool edge, float scale,
                                              float (&most)[2], float (&sum)[2], float (&shrink)[2]) {
    const unsigned column = first + threadIdx.x % 4 * 2;
    float top[2] = {most[0], most[1]};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const unsigned token = column + i / 4 * 8 + i % 2;
        if (edge && token > p0 + i / 2 % 2 * 8) s[i] = NOTHING;
        top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
        shrink[r] = power_of_two((most[r] - top[r]) * scale);
        most[r] = top[r];
        sum[r] *= shrink[r];
    }
    const float from[2] = {top[0] * scale, top[1] * scale};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        s[i] = power_of_two(s[i] * scale - from[i / 2 % 2]);
        sum[i / 2 % 2] += s[i];
    }
}

static __device__ __forceinline__ void pack_all(const float (&s)[64], unsigned (&p)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

static __device__ __forceinline__ void queries_by_keys(float (&s)[64], unsigned q, unsigned k) {
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i)
        multiply(s, matrix(q + i / 4 * (Q_BYTES / 2) + i % 4 * 32, 0), matrix(k + i / 4 * (TILE_BYTES / 2) + i % 4 * 32, 0),
                 i > 0);
}

static __device__ __forceinline__ void weights_by_values(float (&acc)[64], const unsigned (&p)[32], unsigned v) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i)
        multiply(acc, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], matrix(v + i * 2048, TILE_BYTES / 2));
}

// One query head of the block: a warpgroup.
static __device__ __forceinline__ void attend(const bf16* __restrict__ qkv, bf16* __restrict__ out, uint4 work,
                                              unsigned first_row, unsigned n_tiles, unsigned head, unsigned n_q,
                                              unsigned width, float scale, unsigned q, unsigned k, unsigned v,
                                              Barriers* bars) {
    const unsigned thread = threadIdx.x % 128, lane = thread % 32, group = threadIdx.x / 128;
#pragma unroll
    for (int i = 0; i < ROWS * DIM / 8 / 128; ++i) {
        const unsigned piece = i * 128 + thread, row = piece / 16, chunk = piece % 16;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (first_row + row < work.y)
            x = *reinterpret_cast<const uint4*>(qkv + (size_t)(work.x + first_row + row) * width + head * DIM + chunk * 8);
        const unsigned to = q + chunk / 8 * (Q_BYTES / 2) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");

    const unsigned r0 = thread / 32 * 16 + lane / 4, p0 = work.z + first_row + r0;  // the other row is eight below
    float s[64], acc[64], most[2] = {NOTHING, NOTHING}, sum[2] = {0.0f, 0.0f}, shrink[2];
    unsigned p[32];
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] = 0.0f;
    const auto edge = [&](unsigned n) { return (n + 1) * KEYS > work.z + first_row + 1; };

    barrier_wait(address(&bars->keys_full[0]), 0);
    begin_multiplications();
    queries_by_keys(s, q, k);
    commit();
    await_multiplications<0>();
    settled(s);
    if (thread == 0) barrier_arrive(address(&bars->keys_free[0]));
    soften(s, 0, p0, edge(0), scale, most, sum, shrink);
    pack_all(s, p);
#pragma unroll 1
    for (unsigned n = 1; n < n_tiles; ++n) {
        const unsigned stage = n % STAGES, before = (n - 1) % STAGES;
        barrier_wait(address(&bars->keys_full[stage]), n / STAGES % 2);
        begin_multiplications();
        queries_by_keys(s, q, k + stage * TILE_BYTES);
        commit();
        barrier_wait(address(&bars->values_full[before]), (n - 1) / STAGES % 2);
        begin_multiplications();
        weights_by_values(acc, p, v + before * TILE_BYTES);
        commit();
        await_multiplications<1>();
        settled(s);
        if (thread == 0) barrier_arrive(address(&bars->keys_free[stage]));
        soften(s, n * KEYS, p0, edge(n), scale, most, sum, shrink);
        await_multiplications<0>();
        settled(acc);
        if (thread == 0) barrier_arrive(address(&bars->values_free[before]));
#pragma unroll
        for (int i = 0; i < 64; ++i) acc[i] *= shrink[i / 2 % 2];
        pack_all(s, p);
    }
    const unsigned last = (n_tiles - 1) % STAGES;
    barrier_wait(address(&bars->values_full[last]), (n_tiles - 1) / STAGES % 2);
    begin_multiplications();
    weights_by_values(acc, p, v + last * TILE_BYTES);
    commit();
    await_multiplications<0>();
    settled(acc);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        const unsigned row = first_row + r0 + r * 8;
        if (row >= work.y) continue;
        const float by = 1.0f / sum[r];
        bf16* to = out + ((size_t)(work.x + row) * n_q + head) * DIM + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < DIM / 8; ++i)
            *reinterpret_cast<unsigned*>(to + i * 8) = pack(acc[4 * i + 2 * r] * by, acc[4 * i + 2 * r + 1] * by);
    }
}

// One block a tile of 64 rows and pair of query heads. `maps` describe the layer's keys and values as matrices of one row
// a token and head, in boxes of at most 128 tokens of a block and 64 numbers.
extern "C" __global__ void __launch_bounds__(384, 1)
    attend_tiles_hopper(const bf16* __restrict__ qkv, const unsigned char* __restrict__ maps,
                        const uint4* __restrict__ works, const uint2* __restrict__ tiles,
                        const unsigned* __restrict__ blocks, bf16* __restrict__ out, unsigned n_q, unsigned n_kv,
                        unsigned block_shift, float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) Barriers bars;
    const unsigned base = (address(shared) + 1023) & ~1023u;
    const unsigned k = base + 2 * Q_BYTES, v = k + STAGES * TILE_BYTES;
    // Later tiles see more keys: they start first.
    const uint2 tile = tiles[gridDim.x - 1 - blockIdx.x];
    const uint4 work = works[tile.x];  // first row, rows, start, first block
    const unsigned end = work.z + min(tile.y + ROWS, work.y);  // keys that the last row sees
    const unsigned n_tiles = (end + KEYS - 1) / KEYS, group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(address(&bars.keys_full[i]), 1);
            barrier_init(address(&bars.values_full[i]), 1);
            barrier_init(address(&bars.keys_free[i]), 2);
            barrier_init(address(&bars.values_free[i]), 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        bring(maps, blocks, work, end, n_tiles, blockIdx.y * 2 / (n_q / n_kv), n_kv, block_shift, k, v, &bars);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        attend(qkv, out, work, tile.y, n_tiles, blockIdx.y * 2 + group - 1, n_q, (n_q + 2 * n_kv) * DIM, scale,
               base + (group - 1) * Q_BYTES, k, v, &bars);
    }
}
