// Sums of bytes for quantized networks. This file is compiled once for each instruction set, with
// ADDERKIT_INTEGER_KERNELS naming its table. Everything here but the table at the end has internal linkage, and nothing
// of the standard library is instantiated, for the reason given in conv/kernels.cpp.
//
// The instruction that sums 8 absolute differences of bytes is applied to 8 bytes of the window: a vector holds 8 bytes of
// each of several filters, the window's 8 bytes are broadcast against it, and each 64-bit lane accumulates the sum of one
// filter. So no sum is ever taken across lanes.
#include "vectors.h"

namespace adderkit {
namespace {

#define ADDERKIT_UNROLL _Pragma("GCC unroll 8")

// Bytes after the end of a run are 0 here as they are in the weights, so that they add no distance.
inline std::uint64_t load_tail(const Byte* p, Index length) {
    return load<std::uint64_t>(p) & (~std::uint64_t{0} >> (64 - 8 * length));  // written for little-endian machines
}

// Requantizes the sums of kWide channels to bytes, by the formula in adder_layers/integer/plan.py.
struct Requantizer {
    const bool adds, shifts;  // a residual is added, codes are shifted
    const Wide multiplier, offset, shift, quant_max, added, exponent;

    Requantizer(const Factors& factors, Index channel)
        : adds(factors.residual != nullptr), shifts(factors.scale_exponent != nullptr),
          multiplier(load<Wide>(factors.multiplier + channel)), offset(load<Wide>(factors.offset + channel)),
          shift(load<Wide>(factors.shift + channel)), quant_max(factors.quant_max - Wide{}),
          added(adds ? load<Wide>(factors.residual + channel) : Wide{}),
          exponent(shifts ? load<Wide>(factors.scale_exponent + channel) : Wide{}) {}

    void write(Wide sums, const Byte* residual, Byte* out) const {
        Wide total = product(sums, multiplier) + offset;
        if (adds) total += product(widen(residual), added);
        total = shift_right(total > 0 ? total : Wide{}, shift);
        const std::uint64_t codes = shifts ? narrow((total < quant_max ? total : quant_max) << exponent) : saturate(total);
        __builtin_memcpy(out, &codes, kWide);
    }
};

template <int Vectors, int Positions>
inline void adder_step(Sums (&sum)[Positions][Vectors], const std::uint64_t (&x)[Positions], const Byte* weight) {
    Bytes w[Vectors];
    ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) w[v] = load<Bytes>(weight + v * sizeof(Bytes));
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) {
        const Bytes value = broadcast(x[p]);
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] = add(sum[p][v], differences(value, w[v]));
    }
}

// Sums become bytes without leaving the registers. Weights of one term have code of their own, without the loop over terms.
template <bool Terms, int Vectors, int Positions>
void adder_tile(const Byte* const* x, const Runs& runs, const Byte* weight, const Target& target) {
    const Byte* source[Positions];
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) source[p] = x[p];
    Sums sum[Positions][Vectors] = {};
    const Index whole = runs.length & ~Index{7}, tail = runs.length & 7;
    for (Index term = 1;; ++term) {
        for (Index r = 0; r < runs.count; ++r) {
            Index i = runs.offsets[r];
            for (const Index end = i + whole; i < end; i += 8, weight += Vectors * sizeof(Bytes)) {
                std::uint64_t value[Positions];
                ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) value[p] = load<std::uint64_t>(source[p] + i);
                adder_step(sum, value, weight);
            }
            if (tail > 0) {
                std::uint64_t value[Positions];
                ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) value[p] = load_tail(source[p] + i, tail);
                adder_step(sum, value, weight);
                weight += Vectors * sizeof(Bytes);
            }
        }
        if (!Terms || term == runs.terms) break;
        ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p)
            ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v) sum[p][v] = add(sum[p][v], sum[p][v]);
    }
    ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v)
        ADDERKIT_UNROLL for (int i = 0; i < kLanes / kWide; ++i) {
            const Index channel = target.first + v * kLanes + i * kWide;
            const Requantizer requantizer(target.factors, channel);
            ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p)
                requantizer.write(part(sum[p][v], i), target.residual[p] + channel, target.out[p] + channel);
        }
}

// Weights after the end of a run are 0, so the bytes that are read there do not count.
template <int Vectors, int Positions>
void convolution_tile(const Byte* const* x, const Runs& runs, const Byte* weight, std::int64_t* sums) {
    const Byte* source[Positions];
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) source[p] = x[p];
    Products sum[Positions][Vectors] = {};
    for (Index r = 0; r < runs.count; ++r) {
        const Index begin = runs.offsets[r];
        for (Index i = begin; i < begin + runs.length; i += 4, weight += Vectors * kProductLanes * 4) {
            ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p) {
                const Quads value = broadcast_quad(load<std::uint32_t>(source[p] + i));
                ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v)
                    sum[p][v] = add_products(sum[p][v], value, weight + v * kProductLanes * 4);
            }
        }
    }
    ADDERKIT_UNROLL for (int p = 0; p < Positions; ++p)
        ADDERKIT_UNROLL for (int v = 0; v < Vectors; ++v)
            store_products(sums + p * kMaxChannels + v * kProductLanes, sum[p][v]);
}

// Channels separately, 32 at a time, in the compiler's own vectors.
constexpr Index kStrip = 32;
typedef Byte Strip __attribute__((vector_size(kStrip)));
typedef std::int8_t SignedStrip __attribute__((vector_size(kStrip)));
typedef std::uint16_t WideStrip __attribute__((vector_size(2 * kStrip)));
typedef std::int16_t SignedWideStrip __attribute__((vector_size(2 * kStrip)));
typedef std::int32_t SumStrip __attribute__((vector_size(4 * kStrip)));
typedef std::int64_t WideSumStrip __attribute__((vector_size(8 * kStrip)));

inline Strip larger(Strip a, Strip b) { return a > b ? a : b; }
inline Strip smaller(Strip a, Strip b) { return a < b ? a : b; }

// Adds term(byte of the window, weight) over the taps, in the narrow type `Narrow` where a chunk of them fits.
template <typename Narrow, Index Chunk, typename Term>
inline void channel_sums(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                         const Byte* weight, Index weight_row, std::int64_t* sums, Term term) {
    for (Index p = 0; p < positions; ++p, sums += kMaxChannels)
        for (Index c = 0; c < channels; c += kStrip) {
            const Byte* source = x[p] + first + c;
            const Byte* w = weight + first + c;
            SumStrip total = {};
            for (Index begin = 0; begin < taps.count; begin += Chunk) {
                const Index end = begin + Chunk < taps.count ? begin + Chunk : taps.count;
                Narrow sum = {};
                for (Index t = begin; t < end; ++t, w += weight_row) sum += term(source + taps.offsets[t], w);
                total += __builtin_convertvector(sum, SumStrip);
            }
            const WideSumStrip wide = __builtin_convertvector(total, WideSumStrip);
            __builtin_memcpy(sums + c, &wide, sizeof wide);
        }
}

void depthwise_adder(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                     const Byte* weight, Index weight_row, std::int64_t* sums) {
    channel_sums<WideStrip, kDepthwiseTaps>(
        x, positions, taps, first, channels, weight, weight_row, sums, [](const Byte* value, const Byte* w) {
            const Strip a = load<Strip>(value), b = load<Strip>(w);
            return __builtin_convertvector(larger(a, b) - smaller(a, b), WideStrip);
        });
}

void depthwise_convolution(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels,
                           const Byte* weight, Index weight_row, std::int64_t* sums) {
    channel_sums<SignedWideStrip, 1>(
        x, positions, taps, first, channels, weight, weight_row, sums, [](const Byte* value, const Byte* w) {
            return __builtin_convertvector(load<Strip>(value), SignedWideStrip) *
                   __builtin_convertvector(load<SignedStrip>(w), SignedWideStrip);  // at most 255 * 128
        });
}

void window_sums(const Byte* const* x, Index positions, const Runs& taps, Index first, Index channels, const Byte*,
                 Index, std::int64_t* sums) {
    channel_sums<WideStrip, kDepthwiseTaps>(
        x, positions, taps, first, channels, x[0], 0, sums,
        [](const Byte* value, const Byte*) { return __builtin_convertvector(load<Strip>(value), WideStrip); });
}

void window_largest(const Byte* x, const Index* taps, Index count, Index channels, Byte* out) {
    for (Index c = 0; c < channels; c += kStrip) {
        Strip best = {};
        for (Index t = 0; t < count; ++t) best = larger(best, load<Strip>(x + taps[t] + c));
        __builtin_memcpy(out + c, &best, channels - c < kStrip ? channels - c : kStrip);
    }
}

void requantize(const std::int64_t* sums, Index positions, Index channels, const Target& target) {
    for (Index c = 0; c < channels; c += kWide) {
        const Index channel = target.first + c;
        const Requantizer requantizer(target.factors, channel);
        for (Index p = 0; p < positions; ++p)
            requantizer.write(load<Wide>(sums + p * kMaxChannels + c), target.residual[p] + channel,
                              target.out[p] + channel);
    }
}

// Every operation is rounded to fp32 separately (-ffp-contract=off), as in the reference.
void quantize(const float* x, Index x_stride, Index width, Index channels, float reciprocal, const float* shift, Byte* out) {
    for (Index c = 0; c < channels; ++c)
        for (Index i = 0; i < width; ++i) {
            const float code = x[c * x_stride + i] * reciprocal + shift[c];  // truncation is floor from 0 on
            out[i * channels + c] = code > 0.0f ? code < 255.0f ? Byte(code) : Byte{255} : Byte{0};
        }
}

template <int Vectors, int Positions>
void fill(IntegerKernels& table) {
    table.adder[0][Vectors][Positions] = adder_tile<false, Vectors, Positions>;
    table.adder[1][Vectors][Positions] = adder_tile<true, Vectors, Positions>;
    if constexpr (Vectors <= kProductVectors)
        table.convolution[Vectors][Positions] = convolution_tile<Vectors, Positions>;
    if constexpr (Positions > 1)
        fill<Vectors, Positions - 1>(table);
    else if constexpr (Vectors > 1)
        fill<Vectors - 1, kPositions>(table);
}

}  // namespace

IntegerKernels ADDERKIT_INTEGER_KERNELS() {
    IntegerKernels table = {};
    table.positions = kPositions;
    table.adder_shape = {kLanes, kVectors, 8};
    table.convolution_shape = {kProductLanes, kProductVectors, 4};
    fill<kVectors, kPositions>(table);
    table.depthwise_adder = depthwise_adder;
    table.depthwise_convolution = depthwise_convolution;
    table.window_sums = window_sums;
    table.window_largest = window_largest;
    table.requantize = requantize;
    table.quantize = quantize;
    return table;
}

}  // namespace adderkit
