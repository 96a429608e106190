/* WKV, forward and backward: one source for the GPU (nvcc) and for the CPU (g++). No torch header, plain C symbols.

The sums. WKV is a weighted mean over the past, y_t = (N_t + e^(u+k_t) v_t) / (D_t + e^(u+k_t)), of two sums per channel,
    N_{t+1} = e^-w N_t + e^(k_t) v_t,   D_{t+1} = e^-w D_t + e^(k_t).
e^(k_t) overflows, so a State keeps N = a e^(p-nw), D = b e^(p-nw): p is the exponent that leads, n counts the steps since it
came. Counting is exact where subtracting w from p at each step is not: a float near 100 cannot hold 100 - 0.0001.
Weights are always taken relative to the larger one: no exponential sees a positive number, and b >= 1 from the first frame on.

Parallel in time. Time is cut into chunks of CHUNK steps, few enough for registers, and a chunk is worked in three passes:
    1. its own sums, starting from nothing   (absorb)
    2. a scan: the sums of the chunks before it, joined in order of time   (join)
    3. its outputs, one step after the other, starting from those   (outputs)
GPU: a thread has one channel of one chunk. The warps of a block take neighbouring chunks of the same 32 channels, swap sums
through shared memory, and the block goes on to the next stretch of time. k and v are read once and stay in registers.
CPU: a vector of LANES channels stands for the warp. Time is cut into parts only where there are fewer vectors than cores.
With one part this is the classical walk, one thread per channel from the first frame to the last.

Backward runs the same passes in reverse, on the mean m = N/D and l = ln D, where nothing cancels:
    y = m + f (v - m),  f = sigmoid(k + u - l)          m' = m + h (v - m),  h = sigmoid(k + w - l),  l' = ln(e^(l-w) + e^k)
With d = v - m, g the gradient of y, and M, L what the future passes back to m', l', a step gives
    dv = g f + h M     dk = q + h (L + M (1-h) d)     du += q     dw -= c     with q = g f (1-f) d, c = (1-h) (L - M h d)
and passes back g (1-f) + (1-h) M and c - q. That is linear in M and L, so a whole chunk is the map (Adjoint, pass_back)
    M <- M0 + R M     L <- L0 + R (L - S M)     R = product of (1-h), S = sum of h d
Forward saves the state at the start of each chunk; backward needs nothing else. */
#include <math.h>
#include <stdint.h>
#ifndef CHUNK
#define CHUNK 16
#endif

#ifdef __CUDACC__  // --- what differs: on the GPU an F is one channel, and a block has THREADS of them, times up to WARPS chunks
#define LANES 1
#define THREADS 32
#define WARPS 16
#define PADDED 1  // chunks are filled up with steps that weigh nothing, so that every loop has a constant length
#define FN __device__ __forceinline__
typedef float F;
FN F exp_minus(F x) { return __expf(-fabsf(x)); }  // e^-|x|
FN F inverse(F x) { return __fdividef(1.f, x); }
FN bool negative(F x) { return signbit(x); }  // -0 too
FN void fetch(const void*) {}
FN F get(const float* p, int m) { return m ? *p : 0; }  // m: how many of the LANES channels at p exist
FN F get(const uint16_t* p, int m) { return m ? __uint_as_float((uint32_t)*p << 16) : 0; }  // bfloat16
FN void put(float* p, F x, int m) { if (m) *p = x; }
FN void put(uint16_t* p, F x, int m) { if (m) *p = (__float_as_uint(x) + 0x7fff + (__float_as_uint(x) >> 16 & 1)) >> 16; }
#else  // on the CPU an F is a vector of channels, and a block is the work of one core
#include <stddef.h>
#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define THREADS 1
#define WARPS 1
#define PADDED 0
#define FN inline __attribute__((always_inline))
#define __global__ static
#define __shared__
#define __launch_bounds__(n, m)
#define __syncthreads()
static thread_local struct { int64_t x, y; } blockIdx;
static constexpr struct { int x, y; } threadIdx = {0, 0}, blockDim = {1, 1};
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
FN F exp_minus(F x) {  // 2^n e^r, |r| <= ln(2)/2, e^r as a polynomial: relative error 1e-7
    x = (F)((I)x | INT32_MIN);
    x = x < -87.f ? F() - 87.f : x;  // 1.6e-38 stands for everything less
    F n = x * 1.44269504f + 12582912.f;  // + 1.5 * 2^23 rounds, and leaves the integer in the low bits
    F r = x - (n - 12582912.f) * 0.693147181f;
    F e = 1.f + r + r * r * (0.49999232f + r * (0.16667114f + r * (0.04189012f + r * 0.00831253f)));
    return e * (F)(((I)n << 23) + 0x3f800000);
}
FN F inverse(F x) { return 1.f / x; }
FN I negative(F x) { return (I)x < 0; }
FN void fetch(const void* p) { __builtin_prefetch(p); }
template <class V, class Io> FN V load(const Io* p, int m) {
    typedef V Unaligned __attribute__((aligned(sizeof(Io)), may_alias));
    V x = {};
    if (m == LANES) return *(const Unaligned*)p;
    for (int i = 0; i < m; i++) x[i] = p[i];
    return x;
}
template <class V, class Io> FN void store(Io* p, V x, int m) {
    typedef V Unaligned __attribute__((aligned(sizeof(Io)), may_alias));
    if (m == LANES) *(Unaligned*)p = x;
    else for (int i = 0; i < m; i++) p[i] = x[i];
}
FN F get(const float* p, int m) { return load<F>(p, m); }
FN F get(const uint16_t* p, int m) { return (F)(__builtin_convertvector(load<H>(p, m), U) << 16); }
FN void put(float* p, F x, int m) { store(p, x, m); }
FN void put(uint16_t* p, F x, int m) { store(p, __builtin_convertvector(((U)x + 0x7fff + ((U)x >> 16 & 1)) >> 16, H), m); }
#endif

// --- the arithmetic, the same for both. Arrays hold one chunk; where len is a constant (GPU) the loops unroll into registers.
struct State { F a, b, p, n; };
struct Adjoint { F M, L, R, S; };
#define NOTHING State{F(), F(), F() - 1e38f, F()}
#define IDENTITY Adjoint{F(), F(), F() + 1.f, F()}

FN void weigh(F x, F& old, F& now) {  // weights 1 : e^x, scaled so that the larger is 1
    F e = exp_minus(x), one = F() + 1.f;
    old = x > 0.f ? e : one;
    now = x > 0.f ? one : e;
}
FN F lead(const State& s, F w, F k) { return (k - s.p) + s.n * w; }  // by how much exponent k is above the state's
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
    s = {old * s.a + now * next.a, old * s.b + now * next.b, x > 0.f ? next.p : s.p, x > 0.f ? next.n : s.n + len};
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
FN F pack(F x, F rest) { return x < rest ? x : -rest; }  // x and rest = 1 - x in one number: the smaller, which is exact
FN void unpack(F z, F& x, F& rest) {
    F big = 1.f - (negative(z) ? -z : z);
    x = negative(z) ? big : z;
    rest = negative(z) ? -z : big;
}
FN void gates(Adjoint& own, State s, F w, F u, F* k, F* v, const F* g, F* f, int len) {  // k becomes h, v becomes d
    F m = s.b > 0.f ? s.a * inverse(s.b) : F();
    #pragma unroll
    for (int i = 0; i < len; i++) {
        F x = lead(s, w, k[i]), old, now, past, over, h, r, back;
        weigh(x + u, old, now);
        past = old * s.b, over = inverse(past + now);
        f[i] = pack(now * over, past * over);
        v[i] = v[i] - m;
        back = own.R * g[i] * past * over;
        own.M += back;
        own.L -= back * (now * over * v[i] + own.S);
        weigh(x + w, old, now);
        advance(s, w, x, k[i]);
        past = old * s.b, s.b = past + now, over = inverse(s.b);
        h = now * over, r = past * over;
        k[i] = pack(h, r);
        m += h * v[i];
        own.S += h * v[i];
        own.R *= r;
    }
}
FN void pass_back(Adjoint& next, const Adjoint& own) {
    next.L = own.L + own.R * (next.L - own.S * next.M);
    next.M = own.M + own.R * next.M;
    next.R *= own.R, next.S += own.S;
}
FN void gradients(Adjoint& s, F& dw, F& du, F* k, F* v, const F* g, const F* f_, int len) {  // h becomes dk, d becomes dv
    #pragma unroll
    for (int i = len - 1; i >= 0; i--) {
        F h, r, f, rest, d = v[i];
        unpack(k[i], h, r);
        unpack(f_[i], f, rest);
        F q = g[i] * f * rest * d, c = r * (s.L - s.M * h * d);
        k[i] = q + h * (s.L + s.M * r * d);
        v[i] = g[i] * f + h * s.M;
        dw -= c, du += q;
        s.L = c - q;
        s.M = g[i] * rest + r * s.M;
    }
}

// --- memory. wkv.py fills in Args; tensors are contiguous, (B, T, C) ones float32 or bfloat16 (Io), the others float32.
struct Args {
    int64_t where;  // how many threads (CPU), which stream (GPU)
    int B, T, C, bf16, segments, warps;
    float *w, *u, *state, *last;  // (C), (C), (B, 3, C), (B, 3, C)
    float *saved, *scan, *dwu;  // (B, ceil(T / CHUNK), 3, C), (B, segments, 4, C), (B, segments * warps, 2, C)
    void *k, *v, *y, *g, *dk, *dv;  // (B, T, C)
};
struct Site {  // of one F: m channels from c on of batch row b (0 past the last channel), steps begin to end - 1
    int C, m, b, c, begin, end, span;
    FN Site(const Args& a) {
        C = a.C;
        const int blocks = (C + THREADS * LANES - 1) / (THREADS * LANES), chunks = (a.T + CHUNK - 1) / CHUNK;
        b = blockIdx.x / blocks, c = (blockIdx.x % blocks * THREADS + threadIdx.x) * LANES;
        m = C - c >= LANES ? LANES : C > c ? C - c : 0;
        span = (chunks + a.segments - 1) / a.segments * CHUNK;
        begin = blockIdx.y * span, end = begin + span < a.T ? begin + span : a.T;
    }
    FN int64_t at(int rows, int row, int width) const { return ((int64_t)b * rows + row) * width * C + c; }
};
template <class Io> FN void read(F* x, const void* p, const Site& me, int64_t at, int live, int ahead, float none) {
    const Io* row = (const Io*)p + at;
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        x[i] = i < live ? get(row + i * me.C, me.m) : F() + none;
        fetch(row + (i + ahead) * me.C);
    }
}
template <class Io> FN void write(void* p, const F* x, const Site& me, int64_t at, int live) {
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) if (i < live) put((Io*)p + at + i * me.C, x[i], me.m);
}
FN State load_state(const float* p, const Site& me) { return {get(p, me.m), get(p + me.C, me.m), get(p + 2 * me.C, me.m), F()}; }
FN void save_state(float* p, const Site& me, const State& s, F w) {  // p - nw as one float; what it rounds off goes to a and b
    F p_nw = s.p - s.n * w, rest = (s.p - p_nw) - s.n * w, e = exp_minus(rest);
    e = rest > 0.f ? inverse(e) : e;
    put(p, s.a * e, me.m), put(p + me.C, s.b * e, me.m), put(p + 2 * me.C, p_nw, me.m);
}

// --- the passes. Memory that threads share has two halves, used in turns: whoever writes to one knows by the last barrier that
// all have read it, so that a turn needs a single __syncthreads(). A step past the end has its k below every state's p.
template <class Io> __global__ void __launch_bounds__(THREADS * WARPS, 1) forward(const Args a, const int pass) {
    __shared__ State sums[2][WARPS][THREADS], carry[2][THREADS];
    const Site me(a);
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, stretch = warps * CHUNK;
    const F w = get(a.w + me.c, me.m), u = get(a.u + me.c, me.m);
    State s = NOTHING;
    if (pass == 3) {
        s = load_state(a.state + me.at(1, 0, 3), me);
        for (int i = 0; i < blockIdx.y; i++) join(s, load_state(a.scan + me.at(a.segments, i, 4), me), w, me.span);
    }
    if (warp == 0) carry[0][lane] = s;
    int t = me.begin + warp * CHUNK;
    for (int odd = 0; t - warp * CHUNK < me.end; t += stretch, odd ^= 1) {
        const int64_t at = me.at(a.T, t, 1);
        const int live = me.end - t < CHUNK ? me.end - t : CHUNK, len = PADDED ? CHUNK : live;
        F k[CHUNK], v[CHUNK];
        read<Io>(k, a.k, me, at, live, stretch, -2e38f);
        read<Io>(v, a.v, me, at, live, stretch, 0.f);
        State own = NOTHING;
        if (pass == 1 || warp < warps - 1) own_sums(own, w, k, v, len);
        sums[odd][warp][lane] = own;
        __syncthreads();
        s = carry[odd][lane];
        for (int i = 0; i < warp; i++) join(s, sums[odd][i][lane], w, CHUNK);
        if (pass == 3) {
            if (live > 0) save_state(a.saved + me.at((a.T + CHUNK - 1) / CHUNK, t / CHUNK, 3), me, s, w);
            outputs(s, w, u, k, v, len);
            write<Io>(a.y, v, me, at, live);
        } else join(s, own, w, len);
        if (warp == warps - 1) carry[odd ^ 1][lane] = s;
    }
    if (PADDED) s.n -= float(t - warp * CHUNK - me.end);
    if (warp == warps - 1 && pass == 1) save_state(a.scan + me.at(a.segments, blockIdx.y, 4), me, s, w);
    if (warp == warps - 1 && pass == 3 && me.end == a.T) save_state(a.last + me.at(1, 0, 3), me, s, w);
}
template <class Io> __global__ void __launch_bounds__(THREADS * WARPS, 1) backward(const Args a, const int pass) {
    __shared__ Adjoint maps[2][WARPS][THREADS], carry[2][THREADS];
    const Site me(a);
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, stretch = warps * CHUNK;
    const F w = get(a.w + me.c, me.m), u = get(a.u + me.c, me.m);
    F dw = F(), du = F();
    Adjoint next = IDENTITY;
    for (int i = a.segments - 1; pass == 3 && i > blockIdx.y; i--) {
        const float* p = a.scan + me.at(a.segments, i, 4);
        pass_back(next, {get(p, me.m), get(p + me.C, me.m), get(p + 2 * me.C, me.m), get(p + 3 * me.C, me.m)});
    }
    if (warp == 0) carry[0][lane] = next;
    int t = me.begin + (me.end - 1 - me.begin) / stretch * stretch + warp * CHUNK;
    for (int odd = 0; t >= me.begin; t -= stretch, odd ^= 1) {
        const int64_t at = me.at(a.T, t, 1);
        const int live = me.end - t < CHUNK ? me.end - t : CHUNK, len = PADDED ? CHUNK : live;
        F k[CHUNK], v[CHUNK], g[CHUNK], f[CHUNK];
        read<Io>(k, a.k, me, at, live, -stretch, -2e38f);
        read<Io>(v, a.v, me, at, live, -stretch, 0.f);
        read<Io>(g, a.g, me, at, live, -stretch, 0.f);
        State s = {F(), F() + 1.f, F(), F()};
        if (live > 0) s = load_state(a.saved + me.at((a.T + CHUNK - 1) / CHUNK, t / CHUNK, 3), me);
        Adjoint own = IDENTITY;
        gates(own, s, w, u, k, v, g, f, len);
        maps[odd][warp][lane] = own;
        __syncthreads();
        next = carry[odd][lane];
        for (int i = warps - 1; i > warp; i--) pass_back(next, maps[odd][i][lane]);
        if (pass == 3) {
            gradients(next, dw, du, k, v, g, f, len);
            write<Io>(a.dk, k, me, at, live);
            write<Io>(a.dv, v, me, at, live);
        } else pass_back(next, own);
        if (warp == 0) carry[odd ^ 1][lane] = next;
    }
    if (pass == 3) {
        float* p = a.dwu + me.at(a.segments * warps, blockIdx.y * warps + warp, 2);
        put(p, dw, me.m), put(p + me.C, du, me.m);
    } else if (warp == 0) {
        float* p = a.scan + me.at(a.segments, blockIdx.y, 4);
        put(p, next.M, me.m), put(p + me.C, next.L, me.m), put(p + 2 * me.C, next.R, me.m), put(p + 3 * me.C, next.S, me.m);
    }
}
static int run(void (*kernel)(Args, int), const Args& a) {
    const int64_t blocks = a.B * ((a.C + THREADS * LANES - 1) / (THREADS * LANES));
    for (int pass = a.segments > 1 ? 1 : 3; pass <= 3; pass += 2) {
#ifdef __CUDACC__
        kernel<<<dim3(blocks, a.segments), dim3(THREADS, a.warps), 0, (cudaStream_t)a.where>>>(a, pass);
        if (int error = cudaGetLastError()) return error;
#else
        #pragma omp parallel for schedule(dynamic) num_threads(a.where)
        for (int64_t i = 0; i < blocks * a.segments; i++) blockIdx = {i / a.segments, i % a.segments}, kernel(a, pass);
#endif
    }
    return 0;
}
extern "C" int wkv_forward(const Args* a) { return a->bf16 ? run(forward<uint16_t>, *a) : run(forward<float>, *a); }
extern "C" int wkv_backward(const Args* a) { return a->bf16 ? run(backward<uint16_t>, *a) : run(backward<float>, *a); }
