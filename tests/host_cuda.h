// CUDA C++ for the host: kernels written for NVRTC compile with g++ after this header and run on one OS thread.
//
// A block's threads are fibers. One fiber runs thread after thread as plain calls for as long as none of them waits;
// only a thread that waits (in __syncthreads or an operation of its warp) keeps its fiber, and the next threads get
// another. So kernels that never synchronize cost a loop, and those that do cost a longjmp per wait.
//
// Shared memory is thread_local: all of it lies in the library's TLS block, which is filled with 0xFF (NaN) before
// every block, for on a GPU it begins with whatever the last block left there.
//
// Included a second time with HOST_CUDA_FP16 by the stand-in for cuda_fp16.h, so that __half needs that include.
#ifndef HOST_CUDA_H
#define HOST_CUDA_H

#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace host {

constexpr size_t stack_bytes = 1 << 16, page = 1 << 12, dynamic_bytes = 48 << 10;
enum State : char { running, at_block, at_warp, ended };
struct Fiber { ucontext_t start; jmp_buf here; bool started; char* stack; };
struct Waiting { const char* what; int line; unsigned mask; int source; uint64_t in, out; Fiber* fiber; };

static State states[1024];
static Waiting waits[1024];
static uint3 coordinates[1024];
static std::vector<int> order;  // threads of the block, by position in time
static int count, next, current;
static std::vector<Fiber*> fibers, idle;
static Fiber* fiber;
static jmp_buf scheduler;
static void (*run_threads)(void**);
static void** arguments;
static std::string error;

// --- fibers: started by setcontext once, switched by longjmp, which unlike swapcontext calls no system ---

static __attribute__((noinline)) void suspend() {
    if (!_setjmp(fiber->here)) _longjmp(scheduler, 1);
    asm volatile("" ::: "memory");  // others have run
}

static void fiber_main() {
    for (;;) {
        run_threads(arguments);
        idle.push_back(fiber);
        suspend();
    }
}

static __attribute__((noinline)) void resume(Fiber* f) {
    fiber = f;
    if (_setjmp(scheduler)) return;
    if (f->started) _longjmp(f->here, 1);
    f->started = true;
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack + page;
    f->start.uc_stack.ss_size = stack_bytes - page;
    f->start.uc_link = nullptr;
    makecontext(&f->start, fiber_main, 0);
    setcontext(&f->start);
}

static Fiber* idle_fiber() {
    if (idle.empty()) {
        void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(stack, page, PROT_NONE);
        fibers.push_back(new Fiber{{}, {}, false, static_cast<char*>(stack)});
        return fibers.back();
    }
    Fiber* f = idle.back();
    idle.pop_back();
    return f;
}

static std::string place(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

[[noreturn]] static void fail(const std::string& what, int line) {
    error = "line " + std::to_string(line) + ": " + what + " by thread " + place(threadIdx) + " of block " +
            place(blockIdx);
    _longjmp(scheduler, 1);
}

// --- waiting ---

static uint64_t wait(State state, const char* what, int line, unsigned mask, uint64_t in, int source) {
    int me = current;
    states[me] = state;
    waits[me] = {what, line, mask, source, in, 0, fiber};
    suspend();
    return waits[me].out;
}

static void sync_block(int line) { wait(at_block, "__syncthreads", line, 0, 0, 0); }

// What a warp's threads do together: all of `mask` that have not ended arrive, then each is given the value of its
// source (ones all over if that one is not there: undefined in CUDA), or, if the source is -1, all bits of the warp.
static uint64_t warp(const char* what, int line, unsigned mask, uint64_t in, int source) {
    if (!(mask >> (current & 31) & 1)) fail(std::string(what) + " with a mask that lacks the caller,", line);
    return wait(at_warp, what, line, mask, in, source);
}

static bool go_on_in_warp(int thread) {
    const Waiting& me = waits[thread];
    const int first = thread & ~31;
    unsigned there = 0, ballot = 0;
    for (int lane = 0; lane < 32 && first + lane < count; ++lane) {
        const Waiting& other = waits[first + lane];
        if (!(me.mask >> lane & 1) || states[first + lane] == ended) continue;
        if (states[first + lane] != at_warp || other.mask != me.mask || other.line != me.line) return false;
        there |= 1u << lane;
        ballot |= unsigned(other.in != 0) << lane;
    }
    for (int lane = 0; lane < 32; ++lane)
        if (there >> lane & 1) {
            Waiting& w = waits[first + lane];
            w.out = w.source < 0 ? ballot : there >> w.source & 1 ? waits[first + w.source].in : ~uint64_t(0);
            states[first + lane] = running;
        }
    return true;
}

// Every thread waits or has ended: lets go on who may; false if nobody does.
static bool go_on() {
    bool some = false, same = true;
    std::map<std::string, int> where;
    for (int t = 0; t < count; ++t) some |= states[t] == at_warp && go_on_in_warp(t);
    if (some) return true;
    for (int t = 1; t < count; ++t)
        same &= states[t] == states[0] && (states[t] == ended || waits[t].line == waits[0].line);
    if (same && states[0] == ended) return false;
    if (same && states[0] == at_block) {
        memset(states, running, count);
        return true;
    }
    for (int t = 0; t < count; ++t)
        ++where[states[t] == ended ? "ended" : std::string("waiting in ") + waits[t].what + " of line " +
                                                   std::to_string(waits[t].line)];
    error = "divergent synchronization in block " + place(blockIdx) + ", threads:";
    for (auto& [what, threads] : where) error += " " + std::to_string(threads) + " " + what + ",";
    error.pop_back();
    return false;
}

static void run_block() {
    memset(states, running, count);
    next = 0;
    while (next < count && error.empty()) resume(idle_fiber());
    while (error.empty() && go_on())
        for (int i = 0; i < count && error.empty(); ++i)
            if (states[order[i]] == running) {
                current = order[i];
                threadIdx = coordinates[current];
                resume(waits[current].fiber);
            }
}

// --- launching ---

static void arrange(std::vector<int>& items, size_t n, int how, uint64_t& seed) {  // 0 forward, 1 reverse, 2 shuffle
    items.resize(n);
    for (size_t i = 0; i < n; ++i) items[i] = int(how == 1 ? n - 1 - i : i);
    for (size_t i = n; how == 2 && i > 1; --i) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::swap(items[i - 1], items[(seed >> 33) % i]);
    }
}

static int own_shared_memory(dl_phdr_info* library, size_t, void* found) {  // of the library that holds `states`
    bool own = false;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const auto& part = library->dlpi_phdr[i];
        own |= part.p_type == PT_LOAD && uintptr_t(states) - library->dlpi_addr - part.p_vaddr < part.p_memsz;
    }
    for (int i = 0; own && i < library->dlpi_phnum; ++i)
        if (library->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<std::pair<void*, size_t>*>(found) = {library->dlpi_tls_data, library->dlpi_phdr[i].p_memsz};
    return own;
}

static bool untouched(const unsigned char* bytes, size_t n) {
    return n == 0 || (bytes[0] == 0xFF && memcmp(bytes, bytes + 1, n - 1) == 0);
}

static thread_local volatile char touched;  // the TLS block is made when first used

static const char* launch(void (*threads)(void**), void** args, const unsigned* dims, unsigned char* dynamic,
                          size_t dynamic_used, int how, uint64_t seed) {
    std::pair<void*, size_t> shared{};
    std::vector<int> blocks;
    touched = 0;
    dl_iterate_phdr(own_shared_memory, &shared);
    gridDim = dim3(dims[0], dims[1], dims[2]);
    blockDim = dim3(dims[3], dims[4], dims[5]);
    count = int(blockDim.x * blockDim.y * blockDim.z);
    for (unsigned t = 0; t < unsigned(count); ++t)
        coordinates[t] = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    run_threads = threads;
    arguments = args;
    error.clear();
    arrange(blocks, size_t(gridDim.x) * gridDim.y * gridDim.z, how, seed);
    arrange(order, count, how, seed);
    for (unsigned block : blocks) {
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
        if (how == 2) arrange(order, count, how, seed);
        memset(shared.first, 0xFF, shared.second);
        run_block();
        if (dynamic && error.empty() && !untouched(dynamic + dynamic_used, dynamic_bytes - dynamic_used))
            error = "block " + place(blockIdx) + " wrote beyond the " + std::to_string(dynamic_used) +
                    " bytes of dynamic shared memory that the launch gave it";
        if (error.empty()) continue;
        idle = fibers;  // what hangs in the middle of a kernel is given up
        for (Fiber* f : fibers) f->started = false;
        return error.c_str();
    }
    return nullptr;
}

// The codes of NumPy's dtypes (kind and size), "*" before them for a pointer, "*v" for one that takes all.
template <class T> std::string code() {
    using U = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<U>) return "*" + code<std::remove_pointer_t<U>>();
    else if constexpr (std::is_void_v<U>) return "v";
    else if constexpr (std::is_same_v<U, bool>) return "b1";
    else if constexpr (std::is_arithmetic_v<U>)
        return (std::is_floating_point_v<U> ? "f" : std::is_signed_v<U> ? "i" : "u") + std::to_string(sizeof(U));
    else return U::host_code;
}

template <auto kernel> struct Kernel;
template <class... A, void (*kernel)(A...)> struct Kernel<kernel> {
    static std::string signature() {
        std::string all;
        ((all += code<A>() + " "), ...);
        return all;
    }
    template <size_t... i> static void call(void** args, std::index_sequence<i...>) {
        [[maybe_unused]] std::tuple<A...> values(*static_cast<A*>(args[i])...);
        while (next < count) {
            int thread = current = order[next++];
            threadIdx = coordinates[thread];
            kernel(std::get<i>(values)...);
            states[thread] = ended;
        }
    }
    static void threads(void** args) { call(args, std::index_sequence_for<A...>{}); }
};

struct Entry { std::string signature; void (*threads)(void**); };

// --- warp operations, by the line they stand in ---

template <class T> T shuffle(const char* what, int line, unsigned mask, T value, int source) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles take up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = warp(what, line, mask, bits, source);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T> T shuffle_down(int line, unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = current & 31, inside = lane & (width - 1);
    return shuffle("__shfl_down_sync", line, mask, value, inside + delta < unsigned(width) ? lane + delta : lane);
}
template <class T> T shuffle_up(int line, unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = current & 31, inside = lane & (width - 1);
    return shuffle("__shfl_up_sync", line, mask, value, unsigned(inside) >= delta ? lane - delta : lane);
}
template <class T> T shuffle_xor(int line, unsigned mask, T value, int bits, int width = 32) {
    int lane = current & 31, source = lane ^ bits;
    return shuffle("__shfl_xor_sync", line, mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T> T shuffle_from(int line, unsigned mask, T value, int source, int width = 32) {
    int lane = current & 31;
    return shuffle("__shfl_sync", line, mask, value, (lane & -width) + (source & (width - 1)));
}
static inline unsigned ballot(const char* what, int line, unsigned mask, bool is) {
    return unsigned(warp(what, line, mask, is, -1));
}
static inline void sync_warp(int line, unsigned mask = ~0u) { ballot("__syncwarp", line, mask, false); }

// --- mathematics where the host's differs: a GPU orders -0 before +0, and its minimum leaves NaN out ---

template <class T> T least(T a, T b) {
    if constexpr (!std::is_floating_point_v<T>) return b < a ? b : a;
    else return a != a ? b : b != b ? a : a == b ? (signbit(a) ? a : b) : a < b ? a : b;
}
template <class T> T greatest(T a, T b) {
    if constexpr (!std::is_floating_point_v<T>) return a < b ? b : a;
    else return a != a ? b : b != b ? a : a == b ? (signbit(a) ? b : a) : a > b ? a : b;
}
template <class To, class From> To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}
template <class T> using same = std::common_type_t<T>;  // the pointer alone says the type of an atomic operation
template <class T> constexpr bool is_counter =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <class T, class F> T atomically(T* at, F change) {
    T old = *at;
    *at = change(old);
    return old;
}
}  // namespace host

template <class T> T min(T a, T b) { return host::least(a, b); }
template <class T> T max(T a, T b) { return host::greatest(a, b); }
template <class T> T __ldg(const T* at) { return *at; }
#define HOST_ATOMIC(name, types, result)                                                  \
    template <class T> T name(T* at, host::same<T> b) {                                   \
        static_assert(types, "CUDA has no " #name " for this type");                      \
        return host::atomically(at, [b](T a) -> T { return result; });                    \
    }
HOST_ATOMIC(atomicAdd, host::is_counter<T> || std::is_floating_point_v<T>, a + b)
HOST_ATOMIC(atomicSub, host::is_counter<T> && sizeof(T) == 4, a - b)
HOST_ATOMIC(atomicMin, (host::is_counter<T> || std::is_same_v<T, long long>), host::least(a, b))
HOST_ATOMIC(atomicMax, (host::is_counter<T> || std::is_same_v<T, long long>), host::greatest(a, b))
HOST_ATOMIC(atomicOr, host::is_counter<T>, a | b)
HOST_ATOMIC(atomicAnd, host::is_counter<T>, a& b)
HOST_ATOMIC(atomicXor, host::is_counter<T>, a ^ b)
HOST_ATOMIC(atomicExch, host::is_counter<T> || (std::is_same_v<T, float>), b)
template <class T> T atomicCAS(T* at, host::same<T> is, host::same<T> b) {
    static_assert(host::is_counter<T>, "CUDA has no atomicCAS for this type");
    return host::atomically(at, [=](T a) { return a == is ? b : a; });
}
#define HOST_FUNCTION(result, name, parameters, value) \
    static inline result name parameters { return value; }
#define HOST_ROUNDED(T, letter) \
    HOST_FUNCTION(T, __##letter##add_rn, (T a, T b), a + b) \
    HOST_FUNCTION(T, __##letter##sub_rn, (T a, T b), a - b) \
    HOST_FUNCTION(T, __##letter##mul_rn, (T a, T b), a * b) \
    HOST_FUNCTION(T, __##letter##div_rn, (T a, T b), a / b) \
    HOST_FUNCTION(T, __##letter##sqrt_rn, (T a), sqrt(a))
HOST_ROUNDED(float, f)
HOST_ROUNDED(double, d)
HOST_FUNCTION(float, __fmaf_rn, (float a, float b, float c), fmaf(a, b, c))
HOST_FUNCTION(double, __fma_rn, (double a, double b, double c), fma(a, b, c))
HOST_FUNCTION(float, rsqrtf, (float a), float(1 / sqrt(double(a))))  // a GPU's may differ in the last bit
HOST_FUNCTION(double, rsqrt, (double a), 1 / sqrt(a))
HOST_FUNCTION(int, __float_as_int, (float a), host::bits<int>(a))
HOST_FUNCTION(unsigned, __float_as_uint, (float a), host::bits<unsigned>(a))
HOST_FUNCTION(float, __int_as_float, (int a), host::bits<float>(a))
HOST_FUNCTION(float, __uint_as_float, (unsigned a), host::bits<float>(a))
HOST_FUNCTION(long long, __double_as_longlong, (double a), host::bits<long long>(a))
HOST_FUNCTION(double, __longlong_as_double, (long long a), host::bits<double>(a))
HOST_FUNCTION(int, __popc, (unsigned a), __builtin_popcount(a))
HOST_FUNCTION(int, __popcll, (unsigned long long a), __builtin_popcountll(a))
HOST_FUNCTION(int, __clz, (int a), a ? __builtin_clz(a) : 32)
HOST_FUNCTION(int, __clzll, (long long a), a ? __builtin_clzll(a) : 64)
HOST_FUNCTION(int, __ffs, (int a), __builtin_ffs(a))
HOST_FUNCTION(int, __ffsll, (long long a), __builtin_ffsll(a))
HOST_FUNCTION(unsigned, __umulhi, (unsigned a, unsigned b), unsigned(a* uint64_t(b) >> 32))
HOST_FUNCTION(unsigned long long, __umul64hi, (unsigned long long a, unsigned long long b),
              (unsigned long long)((unsigned __int128)a * b >> 64))
static inline void __threadfence() {}
static inline void __threadfence_block() {}

#define fmaxf(a, b) host::greatest<float>(a, b)
#define fminf(a, b) host::least<float>(a, b)
#define fmax(a, b) max(a, b)
#define fmin(a, b) min(a, b)
#define __syncthreads() host::sync_block(__LINE__)
#define __syncwarp(...) host::sync_warp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) host::shuffle_from(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) host::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) host::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) host::shuffle_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, is) host::ballot("__ballot_sync", __LINE__, mask, is)
#define __any_sync(mask, is) int(host::ballot("__any_sync", __LINE__, mask, is) != 0)
#define __all_sync(mask, is) int(host::ballot("__all_sync", __LINE__, mask, !(is)) == 0)
#define __trap() host::fail("__trap", __LINE__)

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// NVRTC has none of these; g++ would have accepted them.
#undef INFINITY
#undef NAN
#undef HUGE_VAL
#undef M_PI
#pragma GCC poison std int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t uintptr_t
#endif

#if defined(HOST_CUDA_FP16) && !defined(HOST_CUDA_HALF)
#define HOST_CUDA_HALF
// Sixteen bits to keep numbers in. Of CUDA's type only the conversions: arithmetic is for floats.
struct __half {
    static constexpr const char* host_code = "f2";
    unsigned short bits;
    __half() = default;
    __half(float value) : __half(double(value)) {}
    __half(double value) {
        const unsigned long long all = __double_as_longlong(value);
        const unsigned short sign = all >> 48 & 0x8000;
        const double size = fabs(value);
        const int exponent = size < 0x1p-14 ? -14 : int(all >> 52 & 0x7FF) - 1023;
        if (value != value) bits = 0x7FFF;  // the one NaN a GPU's conversion makes
        else if (size >= 65520) bits = sign | 0x7C00;
        else bits = sign | (unsigned(exponent + 14) << 10) + unsigned(rint(ldexp(size, 10 - exponent)));
    }
    operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const unsigned special = 0x7F800000u | (fraction ? 0x7FFFFFFFu : (bits & 0x8000u) << 16);
        if (exponent == 31) return __uint_as_float(special);
        const float size = exponent ? ldexpf(float(fraction + 1024), exponent - 25) : ldexpf(float(fraction), -24);
        return bits & 0x8000 ? -size : size;
    }
};
typedef __half half;
#define HOST_NO_HALF(sign) void operator sign(__half, __half) = delete;
HOST_NO_HALF(+) HOST_NO_HALF(-) HOST_NO_HALF(*) HOST_NO_HALF(/)
HOST_NO_HALF(<) HOST_NO_HALF(>) HOST_NO_HALF(<=) HOST_NO_HALF(>=) HOST_NO_HALF(==) HOST_NO_HALF(!=)
HOST_FUNCTION(__half, __float2half_rn, (float a), __half(a))
HOST_FUNCTION(__half, __float2half, (float a), __half(a))
HOST_FUNCTION(__half, __double2half, (double a), __half(a))
HOST_FUNCTION(float, __half2float, (__half a), float(a))
HOST_FUNCTION(unsigned short, __half_as_ushort, (__half a), a.bits)
HOST_FUNCTION(__half, __ushort_as_half, (unsigned short a), host::bits<__half>(a))
#endif
