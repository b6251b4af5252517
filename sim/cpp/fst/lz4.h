// LZ4 block compression for Verilator's FST writer, so that a trace needs no library to be installed.
// Ref: LZ4 Block Format Description, https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace plain_lz4 {

constexpr int kMinMatch = 4, kTail = 12, kLastLiterals = 5, kWindow = 65535;

inline uint32_t load(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

inline uint8_t* put_length(uint8_t* out, int length) {
    for (; length >= 255; length -= 255) *out++ = 255;
    *out++ = static_cast<uint8_t>(length);
    return out;
}

// Literals, then a match of `length` bytes at `distance`; length 0 ends the block.
inline uint8_t* put_sequence(uint8_t* out, const uint8_t* literals, int count, int length, int distance) {
    const int extra = length ? length - kMinMatch : 0;
    *out++ = static_cast<uint8_t>((count < 15 ? count : 15) << 4 | (extra < 15 ? extra : 15));
    if (count >= 15) out = put_length(out, count - 15);
    std::memcpy(out, literals, count);
    out += count;
    if (!length) return out;
    *out++ = static_cast<uint8_t>(distance);
    *out++ = static_cast<uint8_t>(distance >> 8);
    return extra >= 15 ? put_length(out, extra - 15) : out;
}

}  // namespace plain_lz4

inline int LZ4_compressBound(int size) { return size + size / 255 + 16; }

// Greedy search with one candidate a hash.
inline int LZ4_compress_default(const char* source, char* target, int size, int) {
    using namespace plain_lz4;
    const auto* in = reinterpret_cast<const uint8_t*>(source);
    auto* out = reinterpret_cast<uint8_t*>(target);
    std::vector<int> seen(1 << 14, -1);
    int anchor = 0;
    for (int i = 0; i + kTail < size;) {
        int& slot = seen[load(in + i) * 2654435761u >> 18];
        const int match = slot;
        slot = i;
        if (match < 0 || i - match > kWindow || load(in + match) != load(in + i)) {
            ++i;
            continue;
        }
        int length = kMinMatch;
        while (i + length < size - kLastLiterals && in[match + length] == in[i + length]) ++length;
        out = put_sequence(out, in + anchor, i - anchor, length, i - match);
        anchor = i += length;
    }
    out = put_sequence(out, in + anchor, size - anchor, 0, 0);
    return static_cast<int>(reinterpret_cast<char*>(out) - target);
}
