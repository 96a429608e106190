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

#ifdef __CUDACC__  // --- what differs between a GPU thread and a CPU vector: F is one channel there, LANES channels here
typedef float F;
#define FN __device__ __forceinline__
FN F exp_minus(F x) { return __expf(-fabsf(x)); }  // e^-|x|
FN F inverse(F x) { return __fdividef(1.f, x); }
FN bool negative(F x) { return signbit(x); }  // -0 too
FN F get(const float* p, int) { return *p; }
FN F get(const uint16_t* p, int) { return __uint_as_float((uint32_t)*p << 16); }  // bfloat16
FN void put(float* p, F x, int) { *p = x; }
FN void put(uint16_t* p, F x, int) { *p = (__float_as_uint(x) + 0x7fff + (__float_as_uint(x) >> 16 & 1)) >> 16; }
#else
#include <string.h>
#include <vector>
#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
#define FN inline __attribute__((always_inline))
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
template <class V, class Io> FN V load(const Io* p, int m) {  // m live channels, fewer than LANES at the end of C
    V x = {};
    memcpy(&x, p, m == LANES ? sizeof x : m * sizeof *p);
    return x;
}
template <class V, class Io> FN void store(Io* p, V x, int m) { memcpy(p, &x, m == LANES ? sizeof x : m * sizeof *p); }
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
    int64_t B, T, C, bf16, parts, where;  // where: the number of threads (CPU) or the stream (GPU)
    float *w, *u, *state, *last, *saved, *dwu;  // (C), (C), (B, 3, C), the same, (B, ceil(T/CHUNK), 3, C), (parts, B, 2, C)
    void *k, *v, *y, *g, *dk, *dv;  // (B, T, C)
};
struct Place { int64_t b, c, part; int m; };  // channels c to c + m - 1 of batch row b; m = 0 is past the last one

FN int64_t step(const Args& a, Place me, int64_t t) { return (me.b * a.T + t) * a.C + me.c; }
template <class Io> FN void read(F* x, const void* p, const Args& a, Place me, int64_t t, float none = 0.f) {
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = me.m && t + i < a.T ? get((const Io*)p + step(a, me, t + i), me.m) : F() + none;
}
template <class Io> FN void write(void* p, const F* x, const Args& a, Place me, int64_t t) {
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) if (me.m && t + i < a.T) put((Io*)p + step(a, me, t + i), x[i], me.m);
}
FN float* slot(float* p, const Args& a, Place me, int64_t chunk, int64_t chunks) { return p + (me.b * chunks + chunk) * 3 * a.C + me.c; }
FN State load_state(const float* p, const Args& a, Place me) {
    return {get(p, me.m), get(p + a.C, me.m), get(p + 2 * a.C, me.m), F()};
}
FN void save_state(float* p, const Args& a, Place me, const State& s, F w) {  // p - nw as one float; what it rounds off goes to a, b
    F p_nw = s.p - s.n * w, rest = (s.p - p_nw) - s.n * w, e = exp_minus(rest);
    e = rest > 0.f ? inverse(e) : e;
    put(p, s.a * e, me.m), put(p + a.C, s.b * e, me.m), put(p + 2 * a.C, p_nw, me.m);
}

#ifdef __CUDACC__  // --- GPU: a block has 32 channels (threadIdx.x) of up to PARTS neighbouring chunks (threadIdx.y)
// Steps past the end of time weigh nothing, their k lies below every state's p. What is shared has two halves, used in turns:
// whoever writes to one knows by the last barrier that all have read it, so a round of the loop needs only one __syncthreads().
#define PARTS 16
__device__ Place place(const Args& a) {
    int64_t column = blockIdx.x * 32LL + threadIdx.x;
    bool live = column < a.B * a.C;
    return {live ? column / a.C : 0, live ? column % a.C : 0, threadIdx.y, live};
}
template <class Io> __global__ void __launch_bounds__(32 * PARTS) forward(const Args a) {
    __shared__ State sums[2][PARTS][32], carry[2][32];
    const Place me = place(a);
    const int lane = threadIdx.x, parts = blockDim.y;
    const int64_t chunks = (a.T + CHUNK - 1) / CHUNK;
    const F w = a.w[me.c], u = a.u[me.c];
    State s = load_state(slot(a.state, a, me, 0, 1), a, me);
    if (me.part == 0) carry[0][lane] = s;
    int64_t chunk = me.part;
    for (int odd = 0; chunk - me.part < chunks; chunk += parts, odd ^= 1) {
        F k[CHUNK], v[CHUNK];
        read<Io>(k, a.k, a, me, chunk * CHUNK, -2e38f);
        read<Io>(v, a.v, a, me, chunk * CHUNK);
        s = NOTHING;
        #pragma unroll
        for (int i = 0; i < CHUNK; i++) if (me.part < parts - 1) absorb(s, w, k[i], v[i]);  // nobody asks for the last one's
        sums[odd][me.part][lane] = s;
        __syncthreads();
        s = carry[odd][lane];
        for (int i = 0; i < me.part; i++) join(s, sums[odd][i][lane], w, CHUNK);
        if (me.m && chunk < chunks) save_state(slot(a.saved, a, me, chunk, chunks), a, me, s, w);
        outputs(s, w, u, k, v, CHUNK);
        write<Io>(a.y, v, a, me, chunk * CHUNK);
        if (me.part == parts - 1) carry[odd ^ 1][lane] = s;
    }
    s.n -= (chunk - me.part) * CHUNK - a.T;
    if (me.m && me.part == parts - 1) save_state(slot(a.last, a, me, 0, 1), a, me, s, w);
}
template <class Io> __global__ void __launch_bounds__(32 * PARTS) backward(const Args a) {
    __shared__ Adjoint maps[2][PARTS][32], carry[2][32];
    const Place me = place(a);
    const int lane = threadIdx.x, parts = blockDim.y;
    const int64_t chunks = (a.T + CHUNK - 1) / CHUNK;
    const F w = a.w[me.c], u = a.u[me.c];
    F dw = 0, du = 0;
    if (me.part == 0) carry[0][lane] = IDENTITY;
    int64_t chunk = (chunks - 1) / parts * parts + me.part;
    for (int odd = 0; chunk >= 0; chunk -= parts, odd ^= 1) {
        F k[CHUNK], v[CHUNK], g[CHUNK], f[CHUNK];
        read<Io>(k, a.k, a, me, chunk * CHUNK, -2e38f);
        read<Io>(v, a.v, a, me, chunk * CHUNK);
        read<Io>(g, a.g, a, me, chunk * CHUNK);
        State s = {0, 1, 0, 0};
        if (me.m && chunk < chunks) s = load_state(slot(a.saved, a, me, chunk, chunks), a, me);
        Adjoint own = IDENTITY;
        gates(own, s, w, u, k, v, g, f, CHUNK);
        maps[odd][me.part][lane] = own;
        __syncthreads();
        Adjoint next = carry[odd][lane];
        for (int i = parts - 1; i > me.part; i--) pass_back(next, maps[odd][i][lane]);
        gradients(next, dw, du, k, v, g, f, CHUNK);
        write<Io>(a.dk, k, a, me, chunk * CHUNK);
        write<Io>(a.dv, v, a, me, chunk * CHUNK);
        if (me.part == 0) carry[odd ^ 1][lane] = next;
    }
    float* out = a.dwu + (me.part * a.B + me.b) * 2 * a.C + me.c;
    if (me.m) out[0] = dw, out[a.C] = du;
}
static int run(void (*kernel)(Args), const Args& a) {
    kernel<<<(a.B * a.C + 31) / 32, dim3(32, a.parts), 0, (cudaStream_t)a.where>>>(a);
    return cudaGetLastError();
}

#else  // --- CPU: a job is one vector of channels over one part of time
struct Jobs {
    int64_t vectors, count, chunks, span;  // span: chunks in a part
    Jobs(const Args& a) : vectors((a.C + LANES - 1) / LANES), count(a.B * vectors * a.parts), chunks((a.T + CHUNK - 1) / CHUNK),
        span((chunks + a.parts - 1) / a.parts) {}
    Place place(const Args& a, int64_t job) const {
        int64_t i = job / a.parts, c = i % vectors * LANES;
        return {i / vectors, c, job % a.parts, int(a.C - c < LANES ? a.C - c : LANES)};
    }
    int64_t end(Place me) const { return (me.part + 1) * span < chunks ? (me.part + 1) * span : chunks; }
};
template <class Io> static void forward(const Args a) {
    const Jobs jobs(a);
    std::vector<State> sums(jobs.count);
    for (int pass = a.parts > 1 ? 1 : 3; pass <= 3; pass += 2) {
        #pragma omp parallel for schedule(dynamic) num_threads(a.where)
        for (int64_t job = 0; job < jobs.count; job++) {
            const Place me = jobs.place(a, job);
            const F w = get(a.w + me.c, me.m), u = get(a.u + me.c, me.m);
            State s = NOTHING;
            if (pass == 3) {
                s = load_state(slot(a.state, a, me, 0, 1), a, me);
                for (int64_t i = job - me.part; i < job; i++) join(s, sums[i], w, jobs.span * CHUNK);
            }
            for (int64_t chunk = me.part * jobs.span; chunk < jobs.end(me); chunk++) {
                const int len = a.T - chunk * CHUNK < CHUNK ? a.T - chunk * CHUNK : CHUNK;
                F k[CHUNK], v[CHUNK];
                read<Io>(k, a.k, a, me, chunk * CHUNK);
                read<Io>(v, a.v, a, me, chunk * CHUNK);
                if (pass == 3) {
                    save_state(slot(a.saved, a, me, chunk, jobs.chunks), a, me, s, w);
                    outputs(s, w, u, k, v, len);
                    write<Io>(a.y, v, a, me, chunk * CHUNK);
                    if (chunk == jobs.chunks - 1) save_state(slot(a.last, a, me, 0, 1), a, me, s, w);
                } else for (int i = 0; i < len; i++) absorb(s, w, k[i], v[i]);
            }
            if (pass == 1) sums[job] = s;
        }
    }
}
template <class Io> static void backward(const Args a) {
    const Jobs jobs(a);
    std::vector<Adjoint> maps(jobs.count);
    for (int pass = a.parts > 1 ? 1 : 3; pass <= 3; pass += 2) {
        #pragma omp parallel for schedule(dynamic) num_threads(a.where)
        for (int64_t job = 0; job < jobs.count; job++) {
            const Place me = jobs.place(a, job);
            const F w = get(a.w + me.c, me.m), u = get(a.u + me.c, me.m);
            F dw = {}, du = {};
            Adjoint next = IDENTITY;
            if (pass == 3) for (int64_t i = job - me.part + a.parts - 1; i > job; i--) pass_back(next, maps[i]);
            for (int64_t chunk = jobs.end(me) - 1; chunk >= me.part * jobs.span; chunk--) {
                const int len = a.T - chunk * CHUNK < CHUNK ? a.T - chunk * CHUNK : CHUNK;
                F k[CHUNK], v[CHUNK], g[CHUNK], f[CHUNK];
                read<Io>(k, a.k, a, me, chunk * CHUNK);
                read<Io>(v, a.v, a, me, chunk * CHUNK);
                read<Io>(g, a.g, a, me, chunk * CHUNK);
                Adjoint own = IDENTITY;
                gates(own, load_state(slot(a.saved, a, me, chunk, jobs.chunks), a, me), w, u, k, v, g, f, len);
                if (pass == 3) {
                    gradients(next, dw, du, k, v, g, f, len);
                    write<Io>(a.dk, k, a, me, chunk * CHUNK);
                    write<Io>(a.dv, v, a, me, chunk * CHUNK);
                } else pass_back(next, own);
            }
            if (pass == 1) maps[job] = next;
            else {
                float* out = a.dwu + (me.part * a.B + me.b) * 2 * a.C + me.c;
                put(out, dw, me.m), put(out + a.C, du, me.m);
            }
        }
    }
}
static int run(void (*work)(Args), const Args& a) { return work(a), 0; }
#endif

extern "C" int wkv_forward(const Args* a) { return a->bf16 ? run(forward<uint16_t>, *a) : run(forward<float>, *a); }
extern "C" int wkv_backward(const Args* a) { return a->bf16 ? run(backward<uint16_t>, *a) : run(backward<float>, *a); }
