// Executes AMX tile instructions on a processor that has none: the illegal-instruction signal that each of them raises is
// caught, the instruction decoded, its effect computed as Intel's manual (SDM volume 2, TDPBSSD, TDPBF16PS, TILELOADD ...)
// defines it, and the program goes on after it. So the compiled kernel itself is tested, instruction by instruction, and a
// wrong stride, shape or operand shows. A microsecond or two for each: for tests. What it cannot show is speed.
//
// Loaded with LD_PRELOAD, because Linux must also seem to grant the tile registers (arch_prctl).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

struct TileState {
    bool configured = false;
    uint8_t rows[TILES];
    uint16_t bytes[TILES];
    alignas(64) uint8_t data[TILES][ROWS][ROW_BYTES];
};
thread_local TileState state __attribute__((tls_model("initial-exec")));
uint64_t executed;

[[noreturn]] void fault(const char* why) {
    fprintf(stderr, "amx emulator: %s\n", why);
    _exit(86);
}

// The processor faults on each of these; a kernel that does one of them is wrong.
void check(bool allowed, const char* why) {
    if (!allowed) fault(why);
}

void load_config(const uint8_t* from) {
    check(from[0] == 1, "the palette is not 1");
    for (int i = 2; i < 16; ++i) check(from[i] == 0, "a reserved byte of the configuration is set");
    for (int i = 16 + 2 * TILES; i < 48; ++i) check(from[i] == 0, "a tile above 7 has a width");
    for (int i = 48 + TILES; i < 64; ++i) check(from[i] == 0, "a tile above 7 has rows");
    std::memset(&state, 0, sizeof state);
    state.configured = true;
    for (int i = 0; i < TILES; ++i) {
        std::memcpy(&state.bytes[i], from + 16 + 2 * i, 2);
        state.rows[i] = from[48 + i];
        check(state.bytes[i] <= ROW_BYTES && state.rows[i] <= ROWS, "a tile is larger than 16 x 64 bytes");
        check((state.bytes[i] == 0) == (state.rows[i] == 0), "a tile has rows without width, or width without rows");
    }
}

template <typename Number>
Number number(int tile, int row, int at) {
    Number out;
    std::memcpy(&out, &state.data[tile][row][at * sizeof(Number)], sizeof out);
    return out;
}

// Denormal numbers count as zero in these products, as inputs and as results.
float bf16(int tile, int row, int at) {
    const uint32_t bits = static_cast<uint32_t>(number<uint16_t>(tile, row, at)) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return (bits & 0x7F800000u) ? out : 0.0f;
}
float flushed(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return (bits & 0x7F800000u) ? v : 0.0f;
}

// to += left x right; `product(sum, m, k, n)` adds what 32 bits of row m of `left` and row k of `right` give to output n.
template <typename Sum, typename Product>
void dot(int to, int left, int right, Product&& product) {
    check(to != left && to != right && left != right, "a product uses one tile twice");
    check(state.rows[to] && state.rows[left] && state.rows[right], "a product uses a tile that has no shape");
    check(state.rows[to] == state.rows[left], "sums and left operand differ in rows");
    check(state.bytes[to] == state.bytes[right], "sums and right operand differ in width");
    check(state.bytes[left] / 4 == state.rows[right], "width of the left operand is not the rows of the right one");
    for (int m = 0; m < state.rows[to]; ++m)
        for (int n = 0; n < state.bytes[to] / 4; ++n) {
            const Sum sum = product(number<Sum>(to, m, n), m, n);
            std::memcpy(&state.data[to][m][4 * n], &sum, 4);
        }
}

template <typename Left, typename Right>
void dot_bytes(int to, int left, int right) {
    dot<int32_t>(to, left, right, [&](int32_t sum, int m, int n) {
        for (int k = 0; k < state.bytes[left]; ++k) sum += number<Left>(left, m, k) * number<Right>(right, k / 4, 4 * n + k % 4);
        return sum;
    });
}

// Even and odd elements add up apart, each by fused steps; at the end their sum is added to what was there.
void dot_bf16(int to, int left, int right) {
    dot<float>(to, left, right, [&](float sum, int m, int n) {
        float part[2] = {0.0f, 0.0f};
        for (int k = 0; k < state.bytes[left] / 2; ++k)
            part[k % 2] = flushed(__builtin_fmaf(bf16(left, m, k), bf16(right, k / 2, 2 * n + k % 2), part[k % 2]));
        return flushed(flushed(sum) + flushed(part[0] + part[1]));
    });
}

constexpr int REGISTER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct Operand {
    uint8_t* base = nullptr;
    int64_t stride = 0;   // index register times scale: what tile loads take for the distance of rows
    bool has_sib = false;
    int length = 0;       // bytes of ModRM, SIB and displacement
};

// `after` is the byte behind the opcode: ModRM.
Operand memory_operand(const uint8_t* after, const greg_t* registers, int extend_index, int extend_base) {
    const int mod = after[0] >> 6, rm = after[0] & 7;
    Operand out;
    out.length = 1;
    int64_t base = 0;
    bool wide = mod == 2;
    if (rm == 4) {
        const int scale = after[1] >> 6, index = (after[1] >> 3 & 7) | extend_index, low = after[1] & 7;
        out.has_sib = true, out.length = 2;
        if (index != 4) out.stride = registers[REGISTER[index]] << scale;
        if (mod == 0 && low == 5) wide = true;
        else base = registers[REGISTER[low | extend_base]];
    } else if (mod == 0 && rm == 5) {
        fault("an operand relative to the instruction pointer");
    } else {
        base = registers[REGISTER[rm | extend_base]];
    }
    if (mod == 1) base += static_cast<int8_t>(after[out.length]), out.length += 1;
    if (wide) {
        int32_t displacement;
        std::memcpy(&displacement, after + out.length, 4);
        base += displacement, out.length += 4;
    }
    out.base = reinterpret_cast<uint8_t*>(base);
    return out;
}

void move_rows(const Operand& memory, int tile, bool to_memory) {
    check(memory.has_sib, "a tile load without a stride");
    check(state.configured && state.rows[tile], "a tile is loaded or stored that has no shape");
    for (int r = 0; r < state.rows[tile]; ++r) {
        uint8_t* at = memory.base + r * memory.stride;
        if (to_memory) {
            std::memcpy(at, state.data[tile][r], state.bytes[tile]);
        } else {
            std::memset(state.data[tile][r], 0, ROW_BYTES);
            std::memcpy(state.data[tile][r], at, state.bytes[tile]);
        }
    }
}

enum Prefix { NONE, P66, PF3, PF2 };

// Returns the length of the instruction, or 0 when it is none of AMX.
int execute(const uint8_t* code, const greg_t* registers) {
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84)) return 0;  // VEX, map 0F38, W0, 128 bits
    const int extend_index = code[1] & 0x40 ? 0 : 8, extend_base = code[1] & 0x20 ? 0 : 8;
    const int third = ~code[2] >> 3 & 15, prefix = code[2] & 3, opcode = code[3];
    const bool is_register = code[4] >> 6 == 3;
    const int reg = code[4] >> 3 & 7, rm = code[4] & 7;
    if (opcode == 0x5E && is_register) {
        if (prefix == PF2) dot_bytes<int8_t, int8_t>(reg, rm, third);
        if (prefix == PF3) dot_bytes<int8_t, uint8_t>(reg, rm, third);
        if (prefix == P66) dot_bytes<uint8_t, int8_t>(reg, rm, third);
        if (prefix == NONE) dot_bytes<uint8_t, uint8_t>(reg, rm, third);
        return 5;
    }
    if (opcode == 0x5C && is_register && prefix == PF3) return dot_bf16(reg, rm, third), 5;
    if (opcode == 0x49 && is_register && prefix == PF2) {
        check(state.configured && state.rows[reg], "a tile is cleared that has no shape");
        std::memset(state.data[reg], 0, sizeof state.data[reg]);
        return 5;
    }
    if (opcode == 0x49 && is_register && prefix == NONE) return std::memset(&state, 0, sizeof state), 5;
    if (is_register || (opcode != 0x49 && opcode != 0x4B)) return 0;
    const Operand memory = memory_operand(code + 4, registers, extend_index, extend_base);
    if (opcode == 0x49 && prefix == NONE) load_config(memory.base + memory.stride);
    else if (opcode == 0x4B && (prefix == PF2 || prefix == P66)) move_rows(memory, reg, false);
    else if (opcode == 0x4B && prefix == PF3) move_rows(memory, reg, true);
    else return 0;
    return 4 + memory.length;
}

void on_illegal_instruction(int, siginfo_t*, void* raw) {
    greg_t* registers = static_cast<ucontext_t*>(raw)->uc_mcontext.gregs;
    const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    const int length = execute(code, registers);
    if (!length) {
        signal(SIGILL, SIG_DFL);  // not ours: the program ends at the same place again
        return;
    }
    __atomic_fetch_add(&executed, 1, __ATOMIC_RELAXED);
    registers[REG_RIP] += length;
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" {

// How many tile instructions were emulated; a test that expects some can tell that none came.
uint64_t amx_instructions() { return __atomic_load_n(&executed, __ATOMIC_RELAXED); }

// Stands before the C library's: grants the tile registers, passes everything else on.
long syscall(long number, ...) {
    __builtin_va_list list;
    __builtin_va_start(list, number);
    long a[6];
    for (long& one : a) one = __builtin_va_arg(list, long);
    __builtin_va_end(list);
    if (number == SYS_arch_prctl && a[0] == 0x1023 && a[1] == 18) return 0;
    static auto real = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

}  // extern "C"
