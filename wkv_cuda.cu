/* WKV, forward and backward: one source for GPU (nvcc) and CPU (g++). No torch header, plain C symbols.

The sums. WKV is a weighted mean over the past, y_t = (N_t + e^(u+k_t) v_t) / (D_t + e^(u+k_t)), of
    N_{t+1} = e^-w N_t + e^(k_t) v_t,   D_{t+1} = e^-w D_t + e^(k_t)   in each channel.
e^(k_t) overflows, so a State keeps N = a e^(p-nw), D = b e^(p-nw): p is the exponent that leads and n counts
the steps since it came. Counting is exact; subtracting w from p at each step is not: a float near 100 cannot
hold 100 - 0.0001. Two weights are always scaled so that the larger is 1: no exponential sees a positive
number, and b >= 1 from the first step on.

Parallel in time. Time is cut into chunks of CHUNK steps, and a chunk is worked in three passes:
    1. its own sums, starting from nothing   (own_sums)
    2. a scan: the sums of the chunks before it, joined in order of time   (join)
    3. its outputs, one step after the other, starting from those   (outputs)
GPU: a thread has one channel of one chunk, in registers. The warps of a block take neighbouring chunks of the
same 32 channels and swap their sums through shared memory; then the block goes on to the next stretch of time.
CPU: a vector of LANES channels plays the warp, one chunk after the other; only pass 3 is needed.
Where there are too few channels to keep the machine busy, time is also cut into long segments, each for a
block of its own: the kernel runs first for the sums of every segment (pass 1), then for the outputs (pass 3),
which start with a scan of those. One warp and one segment is the classical walk: one thread per channel.

Backward runs the same passes in reverse, on the mean m = N / D and l = ln D, where nothing cancels:
    y = m + f (v - m),   f = sigmoid(k + u - l)
    m' = m + h (v - m),  h = sigmoid(k + w - l),  l' = ln(e^(l-w) + e^k)   for the next step.
With d = v - m, g the gradient of y, and M, L what the future passes back to m', l', a step gives
    dv = g f + h M,   dk = q + h (L + M (1-h) d),   du += q,   dw -= c
        where q = g f (1-f) d,   c = (1-h) (L - M h d)
and passes back M <- g (1-f) + (1-h) M, L <- c - q. This is linear in M and L, so a chunk is the map (Adjoint)
    M <- M0 + R M,   L <- L0 + R (L - S M),   R = product of (1-h),   S = sum of h d.
Forward saves the state at the start of each chunk; backward needs nothing else. */
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
// On the GPU an F is one channel, and a block has 32 of them for up to WARPS chunks. Chunks are always whole
// here (PADDED), so that loops unroll: steps past the end have a k below every state's p and weigh nothing.
enum { LANES = 1, THREADS = 32, WARPS = 16, PADDED = 1 };
typedef float F;
#define FN __device__ __forceinline__
#define SHARED(T) extern __shared__ float4 shared[]; T* const part = (T*)shared
FN F exp_minus(F x) { return __expf(-fabsf(x)); }  // e^-|x|
FN F inverse(F x) { return __fdividef(1.f, x); }
// No kernel writes what it reads: __ldg says so, and lets a load go before the stores above it.
FN F get(const float* p, int) { return __ldg(p); }
FN F get(const uint16_t* p, int) { return __uint_as_float((uint32_t)__ldg(p) << 16); }  // bfloat16
FN void put(float* p, F x, int) { *p = x; }
FN void put(uint16_t* p, F x, int) {
    uint32_t bits = __float_as_uint(x);
    *p = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}
FN void prefetch(const void*) {}
#else
// On the CPU an F is a vector of channels, and a block is a piece of work for one core.
#include <string.h>
enum { LANES = __BIGGEST_ALIGNMENT__ / 4, THREADS = 1, WARPS = 1, PADDED = 0 };
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
static thread_local struct { int x, y; } blockIdx;
static constexpr struct { int x, y; } threadIdx = {0, 0};
#define FN inline __attribute__((always_inline))
#define __global__ static
#define SHARED(T) T part[4]
#define __launch_bounds__(threads, blocks)
#define __syncthreads()
FN F exp_minus(F x) {  // 2^n e^r, |r| <= ln(2)/2, e^r as a polynomial: relative error 1e-7
    x = (F)((I)x | INT32_MIN);
    x = x < -87.f ? F() - 87.f : x;  // 1.6e-38 stands for everything less
    F n = x * 1.44269504f + 12582912.f;  // + 1.5 * 2^23 rounds, and leaves the integer in the low bits
    F r = x - (n - 12582912.f) * 0.693147181f;
    F e = 1.f + r + r * r * (0.49999232f + r * (0.16667114f + r * (0.04189012f + r * 0.00831253f)));
    return e * (F)(((I)n << 23) + 0x3f800000);
}
FN F inverse(F x) { return 1.f / x; }
template <class V, class Io> FN V load(const Io* p, int m) {  // m channels, fewer than LANES at a row's end
    V x = {};
    if (m == LANES) memcpy(&x, p, sizeof x);
    else for (int i = 0; i < m; i++) x[i] = p[i];
    return x;
}
template <class V, class Io> FN void store(Io* p, V x, int m) {
    if (m == LANES) memcpy(p, &x, sizeof x);
    else for (int i = 0; i < m; i++) p[i] = x[i];
}
FN F get(const float* p, int m) { return load<F>(p, m); }
FN F get(const uint16_t* p, int m) { return (F)(__builtin_convertvector(load<H>(p, m), U) << 16); }
FN void put(float* p, F x, int m) { store(p, x, m); }
FN void put(uint16_t* p, F x, int m) {
    U bits = (U)x;
    store(p, __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, H), m);
}
FN void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The arithmetic, the same for both, on one chunk at a time

// alignas: a thread of a GPU reads and writes one in shared memory with a single instruction
struct alignas(16) alignas(F) State { F a, b, p, n; };
struct alignas(16) alignas(F) Adjoint { F M, L, R, S; };
struct Step { F h, r, d, q, gf, gm; };  // r = 1 - h, gf = g f, gm = g (1-f)
#define NOTHING State{F(), F(), F() - 1e38f, F()}
#define IDENTITY Adjoint{F(), F(), F() + 1.f, F()}

FN void weigh(F x, F& old, F& now) {  // weights 1 : e^x, scaled so that the larger is 1
    F e = exp_minus(x), one = F() + 1.f;
    old = x > 0.f ? e : one;
    now = x > 0.f ? one : e;
}
FN F lead(const State& s, F w, F k) { return (k - s.p) + s.n * w; }  // of exponent k over the state's
FN void advance(State& s, F w, F x, F k) {
    s.p = x + w > 0.f ? k : s.p;
    s.n = x + w > 0.f ? F() : s.n + 1.f;
}
FN void absorb(State& s, F w, F k, F v) {
    F x = lead(s, w, k), old, now;
    weigh(x + w, old, now);
    s.a = old * s.a + now * v;
    s.b = old * s.b + now;
    advance(s, w, x, k);
}
FN void own_sums(State& s, F w, const F* k, const F* v, int len) {
    #pragma unroll
    for (int i = 0; i < len; i++) absorb(s, w, k[i], v[i]);
}
FN void join(State& s, const State& next, F w, float len) {  // s, then len steps that by themselves give next
    F x = (next.p - s.p) + (s.n + len - next.n) * w, old, now;
    weigh(x, old, now);
    s.a = old * s.a + now * next.a, s.b = old * s.b + now * next.b;
    s.p = x > 0.f ? next.p : s.p, s.n = x > 0.f ? next.n : s.n + len;
}
FN void outputs(State& s, F w, F u, const F* k, F* v, int len) {  // v becomes y
    #pragma unroll
    for (int i = 0; i < len; i++) {
        F old, now, y;
        weigh(lead(s, w, k[i]) + u, old, now);
        y = (old * s.a + now * v[i]) * inverse(old * s.b + now);
        absorb(s, w, k[i], v[i]);
        v[i] = y;
    }
}
FN void gates(Adjoint& own, State s, F w, F u, const F* k, const F* v, const F* g, Step* steps, int len) {
    F m = s.b > 0.f ? s.a * inverse(s.b) : F();
    #pragma unroll
    for (int i = 0; i < len; i++) {
        F x = lead(s, w, k[i]), old, now, past, over, f;
        Step& z = steps[i];
        weigh(x + u, old, now);
        past = old * s.b, over = inverse(past + now), f = now * over;
        z.d = v[i] - m, z.gf = g[i] * f, z.gm = g[i] * past * over, z.q = z.gm * f * z.d;
        weigh(x + w, old, now);
        advance(s, w, x, k[i]);
        past = old * s.b, s.b = past + now, over = inverse(s.b);
        z.h = now * over, z.r = past * over;
        m += z.h * z.d;
        own.M += own.R * z.gm;
        own.L -= own.R * (z.q + z.gm * own.S);
        own.R *= z.r;
        own.S += z.h * z.d;
    }
}
FN void pass_back(Adjoint& next, const Adjoint& own) {
    next.L = own.L + own.R * (next.L - own.S * next.M);
    next.M = own.M + own.R * next.M;
    next.R *= own.R, next.S += own.S;
}
FN void gradients(Adjoint& next, F& dw, F& du, const Step* steps, F* dk, F* dv, int len) {
    #pragma unroll
    for (int i = len - 1; i >= 0; i--) {
        const Step& z = steps[i];
        F Md = next.M * z.d, c = z.r * (next.L - z.h * Md);
        dk[i] = z.q + z.h * (next.L + z.r * Md);
        dv[i] = z.gf + z.h * next.M;
        dw -= c, du += z.q;
        next.L = c - z.q;
        next.M = z.gm + z.r * next.M;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. Tensors are contiguous; k, v, y, g, dk, dv may be bfloat16 (Io).

struct Args {  // launch in wkv.py fills them in, in this order
    int64_t where;  // how many threads (CPU), which stream (GPU)
    int64_t B, T, C, bf16, segments, warps;
    const float *w, *u;  // (C)
    const void *k, *v;  // (B, T, C)
    float *saved, *scan;  // (B, chunks, 3, C), (B, segments, 4, C)
    union {
        struct { const float* state; float* last; void* y; } fw;  // (B, 3, C) twice, (B, T, C)
        struct { const void* g; void *dk, *dv; float *dw, *du; } bw;  // (B, T, C), then (B, segments * warps, C)
    };
};
struct Site {  // where a thread works: m channels from c on of batch row b, steps begin to end - 1
    int C, m, b, c, warps;
    int64_t begin, end, span;
    FN Site(const Args& a) {
        const int row = (a.C + THREADS * LANES - 1) / (THREADS * LANES), stretch = a.warps * CHUNK;
        C = a.C, warps = a.warps, b = blockIdx.x / row, c = (blockIdx.x % row * THREADS + threadIdx.x) * LANES;
        m = C - c < LANES ? C - c : LANES;
        if (m <= 0) m = c = 0;  // past the last channel: comes along to the barriers, does nothing
        span = ((a.T + stretch - 1) / stretch + a.segments - 1) / a.segments * stretch;
        begin = blockIdx.y * span < a.T ? blockIdx.y * span : a.T;  // the last segments may be empty
        end = begin + span < a.T ? begin + span : a.T;
    }
    // steps of the chunk at t; the place of a row among a batch row's rows, each width * C wide
    FN int live(int64_t t) const { return !m ? 0 : end - t < CHUNK ? end - t : CHUNK; }
    FN int64_t at(int64_t rows, int64_t row, int width) const { return (b * rows + row) * width * C + c; }
    FN int shared(int half, int warp) const { return (half * (warps + 1) + warp) * THREADS + threadIdx.x; }
};
template <class Io>
FN void read(F* x, const void* p, const Site& me, int64_t at, int live, int ahead, float none) {
    const Io* row = (const Io*)p + at;
    #pragma unroll
    for (int i = 0; i < (PADDED ? CHUNK : live); i++) {
        x[i] = i < live ? get(row + i * me.C, me.m) : F() + none;
        prefetch(row + (int64_t)(i + ahead) * me.C);
    }
}
template <class Io> FN void write(void* p, const F* x, const Site& me, int64_t at, int live) {
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) if (i < live) put((Io*)p + at + i * me.C, x[i], me.m);
}
FN State load_state(const float* p, const Site& me) {
    return {get(p, me.m), get(p + me.C, me.m), get(p + 2 * me.C, me.m), F()};
}
FN void save_state(float* p, const Site& me, const State& s, F w) {  // p - nw as one float
    // what rounding takes from it goes to a and b
    F p_nw = s.p - s.n * w, rest = (s.p - p_nw) - s.n * w, e = exp_minus(rest);
    e = rest > 0.f ? inverse(e) : e;
    put(p, s.a * e, me.m), put(p + me.C, s.b * e, me.m), put(p + 2 * me.C, p_nw, me.m);
}

// ---------------------------------------------------------------------------------------------------------------------
// The passes. What threads share, a part from each warp and the carry from the stretch before, has two halves, used in
// turns: whoever writes to one knows by the last barrier that all have read it, so a turn needs one __syncthreads().

template <class Io>
__global__ void __launch_bounds__(THREADS * WARPS, 1) forward(const Args a, const int pass) {
    SHARED(State);
    const Site me(a);
    const int warp = threadIdx.y, warps = a.warps, stretch = warps * CHUNK;
    const F w = get(a.w + me.c, me.m), u = get(a.u + me.c, me.m);
    State s = NOTHING;
    if (pass == 3) s = load_state(a.fw.state + me.at(1, 0, 3), me);
    for (int i = 0; pass == 3 && i < blockIdx.y; i++)
        join(s, load_state(a.scan + me.at(a.segments, i, 4), me), w, me.span);
    if (warp == 0) part[me.shared(0, warps)] = s;
    int64_t t = me.begin + warp * CHUNK;
    for (int odd = 0; t - warp * CHUNK < me.end; t += stretch, odd ^= 1) {
        const int64_t at = me.at(a.T, t, 1);
        const int live = me.live(t), len = PADDED ? CHUNK : live;
        F k[CHUNK], v[CHUNK];
        read<Io>(k, a.k, me, at, live, stretch, -2e38f);
        read<Io>(v, a.v, me, at, live, stretch, 0.f);
        State own = NOTHING;
        if (pass == 1 || warp < warps - 1) own_sums(own, w, k, v, len);
        part[me.shared(odd, warp)] = own;
        __syncthreads();
        s = part[me.shared(odd, warps)];
        for (int i = 0; i < warp; i++) join(s, part[me.shared(odd, i)], w, CHUNK);
        if (pass == 3) {
            if (live > 0) save_state(a.saved + me.at((a.T + CHUNK - 1) / CHUNK, t / CHUNK, 3), me, s, w);
            outputs(s, w, u, k, v, len);
            write<Io>(a.fw.y, v, me, at, live);
        } else join(s, own, w, len);
        if (warp == warps - 1) part[me.shared(odd ^ 1, warps)] = s;
    }
    if (!me.m || warp < warps - 1) return;
    if (PADDED) s.n -= float(t - warp * CHUNK - me.end);
    if (pass == 1) save_state(a.scan + me.at(a.segments, blockIdx.y, 4), me, s, w);
    else if (me.begin < a.T && me.end == a.T) save_state(a.fw.last + me.at(1, 0, 3), me, s, w);
}
template <class Io>
__global__ void __launch_bounds__(THREADS * WARPS, 1) backward(const Args a, const int pass) {
    SHARED(Adjoint);
    const Site me(a);
    const int warp = threadIdx.y, warps = a.warps, stretch = warps * CHUNK;
    const F w = get(a.w + me.c, me.m), u = get(a.u + me.c, me.m);
    F dw = F(), du = F();
    Adjoint next = IDENTITY;
    for (int i = a.segments - 1; pass == 3 && i > blockIdx.y; i--) {
        const float* p = a.scan + me.at(a.segments, i, 4);
        pass_back(next, {get(p, me.m), get(p + me.C, me.m), get(p + 2 * me.C, me.m),
                         get(p + 3 * me.C, me.m)});
    }
    if (warp == 0) part[me.shared(0, warps)] = next;
    int64_t t = me.begin + (me.end - 1 - me.begin) / stretch * stretch + warp * CHUNK;
    for (int odd = 0; t >= me.begin; t -= stretch, odd ^= 1) {
        const int64_t at = me.at(a.T, t, 1);
        const int live = me.live(t), len = PADDED ? CHUNK : live;
        F k[CHUNK], v[CHUNK], g[CHUNK];
        Step steps[CHUNK];
        read<Io>(k, a.k, me, at, live, -stretch, -2e38f);
        read<Io>(v, a.v, me, at, live, -stretch, 0.f);
        read<Io>(g, a.bw.g, me, at, live, -stretch, 0.f);
        State s = {F(), F() + 1.f, F(), F()};
        if (live > 0) s = load_state(a.saved + me.at((a.T + CHUNK - 1) / CHUNK, t / CHUNK, 3), me);
        Adjoint own = IDENTITY;
        gates(own, s, w, u, k, v, g, steps, len);
        part[me.shared(odd, warp)] = own;
        __syncthreads();
        next = part[me.shared(odd, warps)];
        for (int i = warps - 1; i > warp; i--) pass_back(next, part[me.shared(odd, i)]);
        if (pass == 3) {
            gradients(next, dw, du, steps, k, v, len);
            write<Io>(a.bw.dk, k, me, at, live);
            write<Io>(a.bw.dv, v, me, at, live);
        } else pass_back(next, own);
        if (warp == 0) part[me.shared(odd ^ 1, warps)] = next;
    }
    if (me.m && pass == 3) {
        const int64_t at = me.at(a.segments * warps, blockIdx.y * warps + warp, 1);
        put(a.bw.dw + at, dw, me.m), put(a.bw.du + at, du, me.m);
    } else if (me.m && warp == 0) {
        float* p = a.scan + me.at(a.segments, blockIdx.y, 4);
        put(p, next.M, me.m), put(p + me.C, next.L, me.m);
        put(p + 2 * me.C, next.R, me.m), put(p + 3 * me.C, next.S, me.m);
    }
}
// what CUDA says of an error, or null
static const char* run(void (*kernel)(Args, int), const Args& a) {
    const int64_t blocks = a.B * ((a.C + THREADS * LANES - 1) / (THREADS * LANES));
    for (int pass = a.segments > 1 ? 1 : 3; pass <= 3; pass += 2) {
#ifdef __CUDACC__
        const size_t shared = 2 * (a.warps + 1) * THREADS * sizeof(State);
        kernel<<<dim3(blocks, a.segments), dim3(THREADS, a.warps), shared, (cudaStream_t)a.where>>>(a, pass);
        if (cudaError_t error = cudaGetLastError()) return cudaGetErrorString(error);
#else
        #pragma omp parallel for schedule(dynamic) num_threads(a.where)
        for (int64_t i = 0; i < blocks * a.segments; i++) {
            blockIdx = {int(i / a.segments), int(i % a.segments)};
            kernel(a, pass);
        }
#endif
    }
    return nullptr;
}
extern "C" {
const char* wkv_forward(const Args* a) { return run(a->bf16 ? forward<uint16_t> : forward<float>, *a); }
const char* wkv_backward(const Args* a) { return run(a->bf16 ? backward<uint16_t> : backward<float>, *a); }
}
