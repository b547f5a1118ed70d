// Drawing tokens from rows of logits, and scoring them, without sorting a vocabulary. The twin is `worker/src/sampling`,
// whose order this keeps: bias, penalties, ban, temperature, top-k, top-p, min-p, draw; scores are of the raw logits.
//
// Every filter keeps a prefix of the tokens by likelihood, the lower id first among equals, so a filter is a cut: a value,
// and among its equals an id. The cut is found digit by digit from histograms. Weights are whole numbers, exponentials
// times a power of two, so that sums do not depend on their order; the draw is a whole number below their sum. The random
// bits come from the host. A block has a row; limited by reading the row, half a megabyte, from the second-level cache
// five to ten times.

typedef unsigned long long u64;
typedef unsigned short u16;

#define THREADS 512
#define WARPS (THREADS / 32)
#define BINS 2048
#define PENALISES 1u
#define SCORED 2u       // score the token, list the likeliest
#define ONLY_SCORED 4u  // the token is given
#define IN_PROMPT 0x8000u
#define MINUS_INFINITY (-__int_as_float(0x7f800000))
#define NO_SLOT (~0u)

struct Draw {
    unsigned row, slot;
    float temperature, top_p;
    unsigned top_k;
    float min_p, repetition, frequency, presence;
    unsigned flags, n_top, token, bits_low, bits_high, first_edit, n_edits, first_top, unused[3];
};
// Of one part of a row: the largest raw logit, whether one is not a number, the sum of exponentials below the largest,
// and the best of the changed logits.
struct Part {
    float most;
    unsigned bad;
    double sum;
    u64 best;
};
struct Result {
    unsigned token, rank;
    float logit, most;
    double log_sum;
    unsigned bad, n_listed;
};
struct Edit {
    unsigned token;
    float add;
};
struct Listed {
    unsigned token;
    float logit;
};

// Ascending with the number; both zeros are one.
static __device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The number of an order.
static __device__ __forceinline__ float number(unsigned order) {
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// A row of logits; ranks hold `shard` tokens each, `stride` apart.
struct Row {
    float* logits;
    unsigned shard, n_ranks;
    size_t stride;
    __device__ __forceinline__ float& operator[](unsigned token) const {
        if (n_ranks == 1) return logits[token];
        const unsigned rank = token / shard;
        return logits[rank * stride + (token - rank * shard)];
    }
};

static __device__ __forceinline__ Row row_of(float* logits, const Draw& draw, unsigned shard, unsigned n_ranks,
                                             unsigned n_rows) {
    return Row{logits + (size_t)draw.row * shard, shard, n_ranks, (size_t)n_rows * shard};
}

// A logit after penalties; bias and bans are in the row already.
static __device__ __forceinline__ float penalised(float x, const Draw& draw, const u16* __restrict__ seen,
                                                  unsigned token) {
    if (!(draw.flags & PENALISES) || x == MINUS_INFINITY) return x;
    const unsigned count = seen[token];
    if (count == 0) return x;
    if (draw.repetition != 1.0f) x = x > 0.0f ? __fdiv_rn(x, draw.repetition) : __fmul_rn(x, draw.repetition);
    const unsigned n = count & ~IN_PROMPT;
    if (n) x = __fsub_rn(__fsub_rn(x, __fmul_rn(draw.frequency, (float)n)), draw.presence);
    return x;
}

// One block a part of a row and draw: what the row's own block needs to know first, and the edits of single logits.
// `olds` keeps what was there before them.
extern "C" __global__ void __launch_bounds__(256)
    survey_rows(float* __restrict__ logits, const Draw* __restrict__ draws, const Edit* __restrict__ edits,
                float* __restrict__ olds, const u16* __restrict__ seen, Part* __restrict__ parts, unsigned n_vocab,
                unsigned seen_stride, unsigned shard, unsigned n_ranks, unsigned n_rows) {
    __shared__ float tops[8];
    __shared__ double sums[8];
    __shared__ u64 bests[8];
    __shared__ unsigned bads[8];
    const Draw draw = draws[blockIdx.y];
    const Row row = row_of(logits, draw, shard, n_ranks, n_rows);
    const unsigned each = (n_vocab + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each;
    const unsigned end = min(begin + each, n_vocab), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float most = MINUS_INFINITY;
    unsigned bad = 0;
    for (unsigned t = begin + threadIdx.x; t < end; t += 256) {
        const float x = row[t];
        bad |= !(x < __int_as_float(0x7f800000));
        most = fmaxf(most, x);
    }
    for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    bad = __any_sync(~0u, bad);
    if (lane == 0) tops[warp] = most, bads[warp] = bad;
    __syncthreads();
    for (int w = 0; w < 8; ++w) most = fmaxf(most, tops[w]), bad |= bads[w];
    double sum = 0.0;
    if ((draw.flags & SCORED) && most > MINUS_INFINITY)
        for (unsigned t = begin + threadIdx.x; t < end; t += 256) sum += (double)expf(row[t] - most);
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane == 0) sums[warp] = sum;
    u64 best = 0;
    if (!(draw.flags & ONLY_SCORED)) {
        __syncthreads();  // the raw row was read
        for (unsigned e = threadIdx.x; e < draw.n_edits; e += 256) {
            const Edit edit = edits[draw.first_edit + e];
            if (edit.token < begin || edit.token >= end) continue;
            float& x = row[edit.token];
            olds[draw.first_edit + e] = x;
            x = __fadd_rn(x, edit.add);
        }
        __syncthreads();
        const u16* mine = seen + (size_t)(draw.slot == NO_SLOT ? 0 : draw.slot) * seen_stride;
        for (unsigned t = begin + threadIdx.x; t < end; t += 256) {
            const float x = penalised(row[t], draw, mine, t);
            const u64 key = (u64)ordered(x) << 32 | (unsigned)~t;
            best = x > MINUS_INFINITY && key > best ? key : best;
        }
        for (int d = 16; d; d >>= 1) {
            const u64 other = __shfl_xor_sync(~0u, best, d);
            best = other > best ? other : best;
        }
    }
    if (lane == 0) bests[warp] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < 8; ++w) sum += sums[w], best = bests[w] > best ? bests[w] : best;
    parts[blockIdx.y * gridDim.x + blockIdx.x] = Part{most, bad, sum, best};
}

struct Shared {
    unsigned count[BINS];
    u64 weight[BINS];
    u64 warps[WARPS];
    u64 segments[WARPS];
    u64 above_count, above_weight;
    unsigned digit, ties, found, n_listed;
};

// The sum over all threads before this one, and over all.
static __device__ __forceinline__ u64 scan(u64 x, u64& all, Shared& s) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 upto = x;
    for (int d = 1; d < 32; d *= 2) {
        const u64 before = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += before;
    }
    __syncthreads();  // of the last call all have read
    if (lane == 31) s.warps[warp] = upto;
    __syncthreads();
    u64 before = 0;
    all = 0;
    for (unsigned w = 0; w < WARPS; ++w) {
        if (w < warp) before += s.warps[w];
        all += s.warps[w];
    }
    return before + upto - x;
}

// Logits over the temperature, relative to the largest.
struct Scaled {
    static constexpr bool WEIGHS = true;
    Row row;
    const u16* seen;
    const Draw* draw;
    float most, unit;
    __device__ __forceinline__ float fetch(unsigned t) const { return penalised(row[t], *draw, seen, t); }
    __device__ __forceinline__ float value(float x) const {
        const float below = __fsub_rn(x, most);
        return draw->temperature == 1.0f ? below : __fdiv_rn(below, draw->temperature);
    }
    __device__ __forceinline__ float depth(float v) const { return -v; }
    __device__ __forceinline__ u64 weight(float v) const { return (u64)(expf(v) * unit); }
};

// Raw logits.
struct Raw {
    static constexpr bool WEIGHS = false;
    Row row;
    float most;
    __device__ __forceinline__ float fetch(unsigned t) const { return row[t]; }
    __device__ __forceinline__ float value(float x) const { return x; }
    __device__ __forceinline__ float depth(float v) const { return most - v; }
    __device__ __forceinline__ u64 weight(float) const { return 0; }
};

// Calls `body(token, value)` for every `step`-th token; several are under way together.
template <class F, class B>
static __device__ __forceinline__ void over(const F& f, unsigned begin, unsigned end, unsigned step, const B& body) {
    constexpr int BATCH = 8;
#pragma unroll 1
    for (unsigned first = begin; first < end; first += BATCH * step) {
        float x[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) x[i] = first + i * step < end ? f.fetch(first + i * step) : MINUS_INFINITY;
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i * step < end) body(first + i * step, f.value(x[i]));
    }
}

// What is kept: values whose inverse order is below `key`, and of its equals those up to token `last`.
struct Cut {
    unsigned key, last;
    __device__ __forceinline__ bool keeps(float v, unsigned t) const {
        const unsigned inverse = ~ordered(v);
        return v > MINUS_INFINITY && (inverse < key || (inverse == key && t <= last));
    }
};

// The value at which the count (or the weight) of the tokens from the likeliest on reaches `target`: false if it never
// does. `above` is of the tokens that are likelier than it, `ties` how many have it.
template <class F>
static __device__ __forceinline__ bool select(const F& f, unsigned n, bool by_count, u64 target, unsigned& key,
                                              u64& above_count, u64& above_weight, unsigned& ties, Shared& s) {
    unsigned bin = 0, prefix = 0;
    above_count = above_weight = 0;
#pragma unroll 1
    for (int level = 0; level < 4; ++level) {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < BINS; i += THREADS) s.count[i] = 0, s.weight[i] = 0;
        __syncthreads();
        over(f, threadIdx.x, n, THREADS, [&](unsigned, float v) {
            if (!(v > MINUS_INFINITY)) return;
            const unsigned near = (unsigned)fminf(f.depth(v) * 32.0f, 1023.0f);
            unsigned digit = near;
            if (level > 0) {
                const unsigned inverse = ~ordered(v);
                if (near != bin || (level == 2 && inverse >> 21 != prefix) || (level == 3 && inverse >> 10 != prefix))
                    return;
                digit = level == 1 ? inverse >> 21 : level == 2 ? inverse >> 10 & 2047 : inverse & 1023;
            }
            atomicAdd(&s.count[digit], 1u);
            if (F::WEIGHS) atomicAdd(&s.weight[digit], f.weight(v));
        });
        __syncthreads();
        constexpr unsigned EACH = BINS / THREADS;
        const unsigned first = EACH * threadIdx.x;
        u64 own_count = 0, own_weight = 0, all_count, all_weight;
        for (unsigned i = first; i < first + EACH; ++i) own_count += s.count[i], own_weight += s.weight[i];
        const u64 counts = scan(own_count, all_count, s);
        const u64 weights = F::WEIGHS ? scan(own_weight, all_weight, s) : 0;
        if (level == 0 && (by_count ? all_count : all_weight) < target) return false;
        u64 before_count = above_count + counts, before_weight = above_weight + weights;
        for (unsigned i = first; i < first + EACH; ++i) {
            const u64 before = by_count ? before_count : before_weight;
            const u64 own = by_count ? (u64)s.count[i] : s.weight[i];
            if (before < target && target <= before + own)
                s.digit = i, s.ties = s.count[i], s.above_count = before_count, s.above_weight = before_weight;
            before_count += s.count[i], before_weight += s.weight[i];
        }
        __syncthreads();
        above_count = s.above_count, above_weight = s.above_weight, ties = s.ties;
        if (level == 0) bin = s.digit;
        else if (level == 1) prefix = s.digit;
        else if (level == 2) prefix = prefix << 11 | s.digit;
        else key = prefix << 10 | s.digit;
    }
    return true;
}

// The token in whose share of the sum of weights, in the order of ids, the number falls that `target` makes of the sum.
template <class F, class W, class T>
static __device__ __forceinline__ unsigned find(const F& f, const W& weight, unsigned n, const T& target, Shared& s) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, segment = (n + WARPS - 1) / WARPS;
    u64 sum = 0;
    over(f, warp * segment + lane, min((warp + 1) * segment, n), 32, [&](unsigned t, float v) { sum += weight(t, v); });
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    __syncthreads();
    if (lane == 0) s.segments[warp] = sum;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < WARPS; ++w) total += s.segments[w];
    u64 left = target(total);
    unsigned at = 0;
    while (at < WARPS - 1 && left >= s.segments[at]) left -= s.segments[at++];
    const unsigned each = (segment + THREADS - 1) / THREADS, begin = at * segment + threadIdx.x * each;
    const unsigned end = min(begin + each, min((at + 1) * segment, n));
    u64 own = 0, all;
    over(f, begin, end, 1, [&](unsigned t, float v) { own += weight(t, v); });
    const u64 before = scan(own, all, s);
    if (before <= left && left < before + own) {
        u64 upto = before;
        for (unsigned t = begin; t < end; ++t) {
            upto += weight(t, f.value(f.fetch(t)));
            if (left < upto) {
                s.found = t;
                break;
            }
        }
    }
    __syncthreads();
    return s.found;
}

// The first `keep` tokens whose inverse order is `key`.
template <class F>
static __device__ __forceinline__ Cut cut_ties(const F& f, unsigned n, unsigned key, unsigned ties, u64 keep, Shared& s) {
    if (keep >= ties) return Cut{key, ~0u};
    const unsigned last = find(f, [&](unsigned, float v) -> u64 { return ~ordered(v) == key; }, n,
                               [&](u64) { return keep - 1; }, s);
    return Cut{key, last};
}

// What top-k and top-p leave.
static __device__ __forceinline__ Cut filter(const Scaled& f, const Draw& draw, unsigned n, Shared& s) {
    Cut cut{~0u, ~0u};
    unsigned key, ties;
    u64 count, weight, total = 0;
    const bool few = draw.top_k > 0 && draw.top_k < n && select(f, n, true, draw.top_k, key, count, weight, ties, s);
    if (few) {
        cut = cut_ties(f, n, key, ties, draw.top_k - count, s);
        if (draw.top_p >= 1.0f) return cut;
        total = weight + (draw.top_k - count) * f.weight(number(~key));
    } else if (draw.top_p < 1.0f) {
        u64 mine = 0;
        over(f, threadIdx.x, n, THREADS, [&](unsigned, float v) { mine += v > MINUS_INFINITY ? f.weight(v) : 0; });
        scan(mine, total, s);
    } else {
        return cut;
    }
    const double wanted = ceil((double)draw.top_p * (double)total);
    const u64 target = wanted < 1.0 ? 1 : min((u64)wanted, total);
    if (!select(f, n, false, target, key, count, weight, ties, s)) return cut;
    const u64 each = f.weight(number(~key));
    const u64 keep = each ? (target - weight + each - 1) / each : ties;
    const Cut closer = cut_ties(f, n, key, ties, keep, s);
    return closer.key < cut.key || (closer.key == cut.key && closer.last < cut.last) ? closer : cut;
}

// The token of one draw; all threads know it.
static __device__ __forceinline__ unsigned choose(const Scaled& f, const Draw& draw, unsigned n, u64 best, Shared& s) {
    if (draw.temperature <= 0.0f) return ~(unsigned)best;
    const Cut cut = filter(f, draw, n, s);
    const u64 bits = (u64)draw.bits_high << 32 | draw.bits_low;  // 53 of them
    const auto weight = [&](unsigned t, float v) -> u64 {
        if (!cut.keeps(v, t)) return 0;
        if (draw.min_p > 0.0f && v != 0.0f && !(expf(v) >= fminf(draw.min_p, 1.0f))) return 0;
        return f.weight(v);
    };
    // floor(total * bits / 2^53)
    return find(f, weight, n, [&](u64 total) { return __umul64hi(total, bits) << 11 | total * bits >> 53; }, s);
}

// Scores `token` of a raw row: its rank and the likeliest tokens, in no order.
static __device__ __forceinline__ void score(const Raw& raw, const Draw& draw, unsigned token, unsigned n,
                                             Listed* __restrict__ tops, Result& result, Shared& s) {
    const float own = raw.fetch(token);
    u64 mine = 0, likelier;
    over(raw, threadIdx.x, n, THREADS, [&](unsigned, float v) { mine += v > own; });
    scan(mine, likelier, s);
    result.logit = own, result.rank = (unsigned)likelier + 1;
    if (draw.n_top == 0) return;
    Cut cut{~0u, ~0u};
    unsigned key, ties;
    u64 count, weight;
    if (select(raw, n, true, draw.n_top, key, count, weight, ties, s))
        cut = cut_ties(raw, n, key, ties, draw.n_top - count, s);
    if (threadIdx.x == 0) s.n_listed = 0;
    __syncthreads();
    over(raw, threadIdx.x, n, THREADS, [&](unsigned t, float v) {
        if (cut.keeps(v, t)) tops[draw.first_top + atomicAdd(&s.n_listed, 1u)] = Listed{t, v};
    });
    __syncthreads();
    result.n_listed = s.n_listed;
}

// One block a draw. `unit` is the weight of the likeliest token, a power of two: weights of a whole row fit 63 bits.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample_rows(float* __restrict__ logits, const Draw* __restrict__ draws, const Edit* __restrict__ edits,
                const float* __restrict__ olds, u16* __restrict__ seen, const Part* __restrict__ parts,
                unsigned n_parts, Result* __restrict__ results, Listed* __restrict__ tops, unsigned* __restrict__ last,
                unsigned n_vocab, unsigned seen_stride, unsigned shard, unsigned n_ranks, unsigned n_rows, float unit) {
    __shared__ Shared s;
    __shared__ Draw draw;
    if (threadIdx.x == 0) draw = draws[blockIdx.x];
    __syncthreads();
    const Row row = row_of(logits, draw, shard, n_ranks, n_rows);
    const Part* mine = parts + blockIdx.x * n_parts;
    float most = MINUS_INFINITY;
    unsigned bad = 0;
    u64 best = 0;
    for (unsigned p = 0; p < n_parts; ++p) {
        most = fmaxf(most, mine[p].most), bad |= mine[p].bad;
        best = mine[p].best > best ? mine[p].best : best;
    }
    double sum = 0.0;
    if (draw.flags & SCORED)
        for (unsigned p = 0; p < n_parts; ++p)
            if (mine[p].most > MINUS_INFINITY) sum += mine[p].sum * exp((double)mine[p].most - (double)most);
    const bool drawn = !(draw.flags & ONLY_SCORED);
    bad |= most == MINUS_INFINITY || (drawn && best == 0);
    Result result{draw.token, 0, 0.0f, most, log(sum), bad, 0};
    if (!bad) {
        if (drawn) {
            u16* counts = seen + (size_t)draw.slot * seen_stride;
            const float top = number((unsigned)(best >> 32));
            result.token = choose(Scaled{row, counts, &draw, top, unit}, draw, n_vocab, best, s);
            __syncthreads();
            if (threadIdx.x == 0) {
                last[draw.slot] = result.token;
                // A count that is full stays.
                if ((draw.flags & PENALISES) && (counts[result.token] & ~IN_PROMPT) < IN_PROMPT - 1) ++counts[result.token];
            }
        }
        for (unsigned e = threadIdx.x; e < draw.n_edits; e += THREADS)
            row[edits[draw.first_edit + e].token] = olds[draw.first_edit + e];
        __syncthreads();
        if (draw.flags & SCORED) score(Raw{row, most}, draw, result.token, n_vocab, tops, result, s);
    }
    if (threadIdx.x == 0) results[blockIdx.x] = result;
}

// Counts a sequence's tokens in its slot's row, which is zero: the first `n_prompt` as seen, the others as generated.
extern "C" __global__ void __launch_bounds__(256) count_tokens(unsigned* __restrict__ seen,
                                                                const unsigned* __restrict__ tokens, unsigned n_prompt,
                                                                unsigned n) {
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
        unsigned* word = seen + tokens[i] / 2;
        const unsigned shift = tokens[i] % 2 * 16;
        if (i < n_prompt) {
            atomicOr(word, IN_PROMPT << shift);
            continue;
        }
        for (unsigned now = *word;;) {
            if ((now >> shift & ~IN_PROMPT & 0xffffu) == IN_PROMPT - 1) break;
            const unsigned was = atomicCAS(word, now, now + (1u << shift));
            if (was == now) break;
            now = was;
        }
    }
}
