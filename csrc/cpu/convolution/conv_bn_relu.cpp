// conv_bn_relu on the CPU: checks, allocation, splitting over threads. The kernel is in
// cpu/convolution/direct_kernels.h; cpu/convolution/pack.cpp packs the weights.
#include "cpu/convolution/conv_bn_relu.h"

#include <atomic>
#include <numeric>
#include <set>

#include "cpu/convolution/host.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMinTaskTiles = 4;  // tiles that justify another task
// Pieces of a convolution that threads take: small, so that little waits for a thread that the
// system has stopped, but of at least this many products (some 20 us).
constexpr int64_t kPiecesPerThread = 8, kFewestPieces = 4;
constexpr int64_t kPieceProducts = int64_t{1} << 20;
// Slice of x that convolutions of the same x process in turn, while it is in the second-level
// cache.
constexpr int64_t kSliceBytes = 256 * 1024;

// Tiles of a superblock of pixels: all blocks of channels process one superblock before the next.
// Its part of x should stay in the second-level cache, together with the weights if those fit as
// well. Larger weights are streamed once per superblock, from memory at worst, for which it has to
// be large enough (1000 pixels of 12,544 channels by 1,024 outputs: 0.55 of the time with one
// tile).
constexpr int64_t kFewestTilesOfStream = 16;
int64_t superblock_of(const ConvBnRelu& conv, ConvVariant variant) {
  const int64_t element_bytes = operand_bytes(variant);
  const int64_t weight_bytes = conv.R * conv.S * conv.run * conv.K * element_bytes;
  const int64_t tile_bytes = tile_pixels() * conv.stride_h * conv.stride_w * conv.C * element_bytes;
  const bool streams = weight_bytes >= int64_t{1} << 19;
  const int64_t room = streams ? int64_t{1} << 18 : int64_t{1} << 16;
  // All of a small x, so that a thread reads the weights of its own blocks alone.
  if (tiles_of(conv) * tile_bytes <= int64_t{1} << 19) return tiles_of(conv);
  return std::min(std::max(room / tile_bytes, streams ? kFewestTilesOfStream : int64_t{1}),
                  tiles_of(conv));
}

// conv for tiles [begin, end). If its x is still in 16 bits, that part is widened into thread-local
// memory.
ConvBnRelu widened(const ConvBnRelu& conv, ConvVariant variant, int64_t begin, int64_t end) {
  ConvBnRelu found = conv;
  if (!conv.narrow) return found;
  thread_local std::vector<float> memory;
  const int64_t first = begin * tile_pixels();
  const int64_t count = std::min(end * tile_pixels(), conv.N * conv.P * conv.Q) - first;
  memory.resize(std::max(memory.size(), static_cast<size_t>(count * conv.C)));
  cpu_kernels().widen[variant](static_cast<const char*>(conv.narrow) + first * conv.C * 2,
                               memory.data(), count * conv.C);
  found.x = memory.data() - first * conv.C;
  return found;
}

// The block of channels of a work item.
int64_t block_at(const ConvBnRelu& conv, int64_t super, int64_t item) {
  const int64_t tiles = tiles_of(conv), blocks = blocks_of(conv);
  const int64_t start = item / (super * blocks) * super;
  return (item - start * blocks) / std::min(super, tiles - start);
}

// The packed weights of a block of channels, of which the first kMostUpcoming bytes are prefetched.
constexpr int64_t kMostUpcoming = 256 * 1024;
Upcoming weights_of_block(const ConvBnRelu& conv, ConvVariant variant, int64_t block) {
  const int64_t bytes = conv.R * conv.S * round_up(conv.run, variant == kBFloatPairs ? 2 : 1) *
                        operand_bytes(variant);
  const int64_t outputs = std::min(kBlockChannels, conv.K - block * kBlockChannels);
  return {static_cast<const char*>(conv.weight) + block * kBlockChannels * bytes,
          std::min(outputs * bytes, kMostUpcoming)};
}

// Work items [begin, end) of tiles_of() * blocks_of(), after which `after` is read.
void run_blocks(const ConvBnRelu& conv, ConvVariant variant, int64_t begin, int64_t end,
                Upcoming after = {}) {
  const auto kernel = cpu_kernels().conv_bn_relu[variant];
  const int64_t tiles = tiles_of(conv), blocks = blocks_of(conv);
  const int64_t super = superblock_of(conv, variant);
  ConvBnRelu prepared = conv;
  int64_t prepared_start = -1;
  while (begin < end) {
    const int64_t start = begin / (super * blocks) * super;
    const int64_t length = std::min(super, tiles - start);
    if (start != prepared_start) prepared = widened(conv, variant, start, start + length);
    prepared_start = start;
    const int64_t place = begin - start * blocks;
    const int64_t block = place / length, tile = place % length;
    const int64_t count = std::min(length - tile, end - begin);
    begin += count;
    prepared.after = after;
    if (begin < end) prepared.after = weights_of_block(conv, variant, block_at(conv, super, begin));
    kernel(prepared, block, start + tile, start + tile + count);
  }
}

bool has_16_channels(const ConvBnRelu& conv) {
  return conv.C == 16 && conv.K == 16 && conv.winograd_tile == 2 &&
         conv.dilation_h * conv.dilation_w == 1 && cpu_kernels().conv_winograd_16[kFloat];
}

class Winograd {
 public:
  Winograd(const ConvBnRelu& conv, ConvVariant variant)
      : group(has_16_channels(conv) ? kTilesOf16 : tile_pixels()),
        at_once(has_16_channels(conv) ? 4 : winograd_groups(conv.winograd_tile, group, conv.C)),
        conv_(conv),
        variant_(variant) {}

  // All channels of tiles [begin, end), whole groups but for the last.
  void run(int64_t begin, int64_t end) const {
    if (has_16_channels(conv_))
      cpu_kernels().conv_winograd_16[variant_](conv_, begin, end);
    else
      run_blocks(0, blocks_of(conv_), begin / group, (end + group - 1) / group);
  }

  // Blocks [block_begin, block_end) of channels of groups [begin, end), unless there are 16.
  void run_blocks(int64_t block_begin, int64_t block_end, int64_t begin, int64_t end) const {
    thread_local std::vector<char> memory;
    char* scratch =
        aligned(memory, winograd_scratch_bytes(conv_.winograd_tile, tile_pixels(), conv_.C));
    cpu_kernels().conv_bn_relu_winograd[variant_](conv_, scratch, block_begin, block_end, begin,
                                                  end);
  }

  const int64_t group;    // tiles that are computed together
  const int64_t at_once;  // groups whose buffers fit the cache

 private:
  const ConvBnRelu& conv_;
  ConvVariant variant_;
};

void run_winograd(const ConvBnRelu& conv, ConvVariant variant) {
  const Winograd winograd(conv, variant);
  const int64_t tiles = winograd_tiles(conv, conv.winograd_tile), blocks = blocks_of(conv);
  const int64_t groups = (tiles + winograd.group - 1) / winograd.group;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t passes = (groups + winograd.at_once - 1) / winograd.at_once;
  const int64_t pieces_per_thread = (passes + threads - 1) / threads;
  // Split by groups or, if there are too few to balance, by blocks; every thread then transforms x.
  if (groups < 8 * threads && blocks % threads == 0 && !has_16_channels(conv))
    Split(blocks, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
      winograd.run_blocks(begin, end, 0, groups);
    });
  else
    // As many tiles as share one pass over the weights, evenly.
    Split(tiles, winograd.group, winograd.group, pieces_per_thread)
        .run([&](int64_t, int64_t begin, int64_t end) { winograd.run(begin, end); });
}

void report(const ConvBnRelu& conv, ConvVariant variant, const TileCallback& callback, int64_t task,
            int64_t begin, int64_t end) {
  const int64_t pixel_bytes = conv.K * (variant == kFloat ? 4 : 2);
  callback(task, static_cast<const char*>(conv.y) + begin * pixel_bytes, begin, end);
}

// Tasks cover whole rows of tiles, interleaved ones together, that is, whole rows of y.
bool run_winograd_with_callback(const ConvBnRelu& conv, ConvVariant variant,
                                const TileCallback& callback) {
  const Winograd winograd(conv, variant);
  const int64_t m = conv.winograd_tile, tiles = winograd_tiles(conv, m), d = conv.dilation_h;
  const int64_t rows = winograd_tiles_along(conv.P, m, d) / d;
  const int64_t row_tiles = winograd_tiles_along(conv.Q, m, conv.dilation_w) * d;
  const int64_t granule = std::lcm(winograd.group, row_tiles);
  const int64_t step = winograd.at_once * winograd.group;
  if (tiles / granule < 8 * torch::stable::get_num_threads()) return false;
  const auto first_pixel = [&](int64_t row) {
    return (row / rows * conv.P + row % rows * m * d) * conv.Q;
  };
  Split(tiles, granule, granule).run([&](int64_t task, int64_t begin, int64_t end) {
    int64_t reported = begin / row_tiles;
    for (int64_t tile = begin; tile < end; tile += step) {
      const int64_t stop = std::min(tile + step, end), done = stop / row_tiles;
      winograd.run(tile, stop);
      if (done > reported)
        report(conv, variant, callback, task, first_pixel(reported), first_pixel(done));
      reported = std::max(reported, done);
    }
  });
  return true;
}

bool run_direct_with_callback(const ConvBnRelu& conv, ConvVariant variant,
                              const TileCallback& callback) {
  const int64_t tiles = tiles_of(conv), pixels = conv.N * conv.P * conv.Q;
  if (tiles < 8 * torch::stable::get_num_threads()) return false;
  const auto kernel = cpu_kernels().conv_bn_relu[variant];
  const int64_t super = superblock_of(conv, variant), blocks = blocks_of(conv);
  Split(tiles, 1, kMinTaskTiles).run([&](int64_t task, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile += super) {
      const int64_t stop = std::min(tile + super, end);
      const ConvBnRelu prepared = widened(conv, variant, tile, stop);
      for (int64_t block = 0; block < blocks; ++block) kernel(prepared, block, tile, stop);
      report(conv, variant, callback, task, tile * tile_pixels(),
             std::min(stop * tile_pixels(), pixels));
    }
  });
  return true;
}

// The outputs [first, second) of one dimension for which a tap reads x, not its padding.
std::pair<int64_t, int64_t> outputs_inside(int64_t tap, int64_t outputs, int64_t size,
                                           int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t before = pad - tap * dilation;
  const auto reached = [&](int64_t n) {
    return n <= 0 ? 0 : std::min((n + stride - 1) / stride, outputs);
  };
  return {reached(before), reached(before + size)};
}
std::pair<int64_t, int64_t> columns_inside(const ConvShape& c, int64_t s) {
  return outputs_inside(s, c.Q, c.W, c.stride_w, c.pad_w, c.dilation_w);
}

// Rows (columns) of y times the taps that read x for them.
int64_t row_taps(const ConvShape& c) {
  int64_t count = 0;
  for (int64_t r = 0; r < c.R; ++r) {
    const auto [begin, end] = outputs_inside(r, c.P, c.H, c.stride_h, c.pad_h, c.dilation_h);
    count += end - begin;
  }
  return count;
}
int64_t column_taps(const ConvShape& c) {
  int64_t count = 0;
  for (int64_t s = 0; s < c.S; ++s) {
    const auto [begin, end] = columns_inside(c, s);
    count += end - begin;
  }
  return count;
}

// Whether to compute the convolution in bands (bands_of): they save a sixteenth of the products.
// Measured on Zen 5, 512 channels at 20 x 20: dilation 2 0.96 of the time, dilation 4 0.93. Not
// without dilation: narrow bands have more tiles of several rows (at 7 x 7 1.07 of the time).
bool has_bands(const ConvShape& c) {
  return c.dilation_w > 1 && 16 * column_taps(c) <= 15 * c.S * c.Q;
}

// The convolution in bands of y's columns that read x with the same taps, so that whole tiles skip
// the others; as it is where that saves too little.
std::vector<ConvBnRelu> bands_of(const ConvBnRelu& conv, ConvVariant variant) {
  if (!has_bands(conv)) return {conv};
  std::set<int64_t> edges{0, conv.Q};
  for (int64_t s = 0; s < conv.S; ++s) {
    const auto [begin, end] = columns_inside(conv, s);
    edges.insert({begin, end});
  }
  std::vector<ConvBnRelu> bands;
  const int64_t pixel_bytes = conv.K * (variant == kFloat ? 4 : 2);
  for (auto edge = edges.begin(); std::next(edge) != edges.end(); ++edge) {
    ConvBnRelu& band = bands.emplace_back(conv);
    const int64_t begin = *edge;
    band.Q = *std::next(edge) - begin, band.pad_w -= begin * conv.stride_w;
    band.y_image = conv.P * conv.Q, band.y_row = conv.Q, band.y_column = 1;
    band.y = static_cast<char*>(conv.y) + begin * pixel_bytes;
    if (conv.residual)
      band.residual = static_cast<const char*>(conv.residual) + begin * pixel_bytes;
  }
  return bands;
}

std::atomic<int> bfloat16_choice{-1};  // -1: automatic

// Whether kernels with a bfloat16 dot product are available, and whether they are faster.
struct BFloat16Dot {
  bool available = false, faster = false;
  BFloat16Dot() {
#if defined(__x86_64__)
    available = cpu_kernels().conv_bn_relu[kBFloatPairs] && __builtin_cpu_supports("avx512bf16");
    faster = available && __builtin_cpu_is("amd");
#endif
  }
};

}  // namespace

std::optional<ConvVariant> conv_variant(DtypeIndex dtype) {
  static const BFloat16Dot dot;
  if (!cpu_kernels().conv_bn_relu[kFloat]) return std::nullopt;
  if (dtype == kFloat32) return kFloat;
  if (dtype == kFloat16) return kHalfWidened;
  if (dtype != kBFloat16) return std::nullopt;
  const int choice = bfloat16_choice.load();
  const bool pairs = choice < 0 ? dot.faster : dot.available && choice == 0;
  return pairs ? kBFloatPairs : kBFloatWidened;
}

bool widens_bfloat16() { return conv_variant(kBFloat16) == kBFloatWidened; }

void widen_bfloat16(int choice) { bfloat16_choice = choice; }

int64_t winograd_tile(const ConvShape& c, ConvVariant variant,
                      std::initializer_list<int64_t> tiles) {
  const auto rounded = [](int64_t n) { return static_cast<double>(round_up(n, tile_pixels())); };
  int64_t best = 0;
  // Of the taps in the padding, the direct kernel skips rows and, in bands, columns.
  const double columns = static_cast<double>(has_bands(c) ? column_taps(c) : c.S * c.Q);
  const double taps = static_cast<double>(row_taps(c)) * columns / static_cast<double>(c.P * c.Q);
  double least = rounded(c.N * c.P * c.Q) * (variant == kBFloatPairs ? taps / 2 : taps);
  for (const int64_t m : tiles) {
    if (!winograd_supported(variant, m)) continue;
    const double products = rounded(winograd_tiles(c, m)) * winograd_products(m) * 1.2;
    if (products < least) least = products, best = m;
  }
  return best;
}

int64_t largest_winograd_tile(const ConvShape& c, ConvVariant variant, int64_t max_weights_4) {
  const int64_t strides = c.stride_h * c.stride_w, weights = c.C * c.K;
  if (c.R != 3 || c.S != 3 || strides != 1 || c.C % 16 || c.K % 16 || c.grouped()) return 0;
  const bool wide = c.C >= 64 && c.K >= 64 && weights <= max_weights_4;
  if (wide && winograd_supported(variant, 4)) return 4;
  const bool dilated = c.dilation_h * c.dilation_w > 1;
  const int64_t most = dilated ? kMaxWinogradWeightsDilated : kMaxWinogradWeights;
  return weights <= most && winograd_supported(variant, 2) ? 2 : 0;
}

int64_t winograd_tile_of_step(const ConvShape& c, ConvVariant variant, int64_t max_weights_4) {
  const int64_t largest = largest_winograd_tile(c, variant, max_weights_4);
  if (largest == 0) return 0;
  return largest == 4 ? winograd_tile(c, variant, {2, 4}) : winograd_tile(c, variant, {2});
}

bool run_convolution(const ConvBnRelu& conv, ConvVariant variant, const TileCallback& callback) {
  if (conv.winograd && winograd_tile(conv, variant, {conv.winograd_tile})) {
    if (callback && run_winograd_with_callback(conv, variant, callback)) return true;
    run_winograd(conv, variant);
    return false;
  }
  const auto bands = bands_of(conv, variant);
  if (callback && bands.size() == 1 && run_direct_with_callback(conv, variant, callback))
    return true;
  run_direct(bands.data(), bands.size(), variant);
  return false;
}

namespace {

// Work items of a piece: whole runs of a block of channels over a superblock where there are enough
// of them, since each run streams its weights; else even parts of one.
int64_t piece_items(const ConvBnRelu& conv, ConvVariant variant) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t super = superblock_of(conv, variant), blocks = blocks_of(conv);
  const int64_t total = tiles_of(conv) * blocks;
  const int64_t products = tile_pixels() * kBlockChannels * conv.run * conv.R * conv.S;
  const int64_t least = std::max<int64_t>(kPieceProducts / products, 1);
  const int64_t wanted = std::max(total / (kPiecesPerThread * threads), least);
  if (conv.narrow) return round_up(wanted, super * blocks);  // widens x by superblocks
  if (wanted >= super) return round_up(wanted, super);
  if (total >= kFewestPieces * threads * super) return super;
  const int64_t parts = (super + wanted - 1) / wanted;
  return (super + parts - 1) / parts;
}

// One convolution in pieces that threads take, as many for each.
void run_direct(const ConvBnRelu& conv, ConvVariant variant) {
  const int64_t total = tiles_of(conv) * blocks_of(conv), size = piece_items(conv, variant);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = std::min(round_up((total + size - 1) / size, threads), total);
  const int64_t super = superblock_of(conv, variant);
  run_pieces(pieces, [&](int64_t piece) {
    const int64_t begin = total * piece / pieces, end = total * (piece + 1) / pieces;
    // A thread takes the next piece, or begins with its share of the next convolution.
    const int64_t share = (piece + 1) * threads / pieces - 1;
    Upcoming after{};
    if (pieces * (share + 1) / threads == piece + 1)
      after = {conv.after.at + conv.after.bytes * share / threads / 64 * 64,
               std::min(conv.after.bytes / threads, kMostUpcoming)};
    else if (block_at(conv, super, end - 1) != block_at(conv, super, end))
      after = weights_of_block(conv, variant, block_at(conv, super, end));
    run_blocks(conv, variant, begin, end, after);
  });
}

}  // namespace

void run_direct(const ConvBnRelu* convs, size_t count, ConvVariant variant) {
  if (count == 1) return run_direct(convs[0], variant);
  int64_t all = 0;
  for (size_t i = 0; i < count; ++i) all = std::max(all, tiles_of(convs[i]) * blocks_of(convs[i]));
  const Split split(all, 1, kMinTaskTiles);
  const ConvBnRelu& first = convs[0];
  const int64_t task_bytes =
      first.N * first.H * first.W * first.C * operand_bytes(variant) / split.tasks;
  const int64_t slices = task_bytes / kSliceBytes + 1, parts = split.tasks * slices;
  split.run([&](int64_t task, int64_t, int64_t) {
    for (int64_t part = task * slices; part < (task + 1) * slices; ++part)
      for (size_t i = 0; i < count; ++i) {
        const int64_t total = tiles_of(convs[i]) * blocks_of(convs[i]);
        run_blocks(convs[i], variant, total * part / parts, total * (part + 1) / parts);
      }
  });
}

namespace {

// Copies one row of an image, W pixels of C values with strides `step_w` and `step_c`.
template <typename T>
void copy_row(const T* from, T* to, int64_t C, int64_t W, int64_t step_c, int64_t step_w,
              int64_t channels) {
  if (step_c == 1 && step_w == C && channels == C) {
    std::copy_n(from, W * C, to);
    return;
  }
  if (C == 3 && step_w == 1) {  // contiguous RGB
    for (int64_t w = 0; w < W; ++w)
      for (int64_t c = 0; c < 3; ++c) to[w * channels + c] = from[c * step_c + w];
    return;
  }
  for (int64_t w = 0; w < W; ++w)
    for (int64_t c = 0; c < C; ++c) to[w * channels + c] = from[w * step_w + c * step_c];
}

// x (N, C, H, W), of any strides -> (N, channels, H + 2 padding, W + 2 padding), channels_last,
// with zeros around the image and in the channels from C on
Tensor with_padding(const Tensor& x, int64_t channels, int64_t pad_h, int64_t pad_w) {
  check(x.dim() == 4 && channels >= x.size(1),
        "conv_bn_relu: x must have shape (N, C, H, W) with C at most ", channels, ", got ",
        shape_of(x));
  const int64_t N = x.size(0), H = x.size(2) + 2 * pad_h, W = x.size(3) + 2 * pad_w;
  Tensor y = empty_channels_last(x, N, channels, H, W);
  const auto copy = [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    Split(N * H, 1, 16384 / (W * channels)).run([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* out = to + row * W * channels;
        const int64_t h = row % H - pad_h;
        std::fill_n(out, W * channels, T{});
        if (h < 0 || h >= x.size(2)) continue;
        const T* image = from + row / H * x.stride(0) + h * x.stride(2);
        copy_row(image, out + pad_w * channels, x.size(1), x.size(3), x.stride(1), x.stride(3),
                 channels);
      }
    });
  };
  x.element_size() == 2 ? copy(uint16_t{}) : copy(uint32_t{});
  return y;
}

}  // namespace

// x (N, C, H, W), residual and result (N, K, P, Q): channels_last in memory, of one dtype; x of any
// strides if it is copied with its padding. weight and winograd (of F(2x2, 3x3) or F(4x4, 3x3), or
// empty): flat, packed by cpu/convolution/pack.cpp. scale, shift: float32, (K,), zero-padded to a
// multiple of 64. first_channel: int64, (K / 16,), padded to a multiple of 4, or empty for one
// group. The result overwrites the residual if `overwrite`, unless that is x.
Tensor conv_bn_relu_before(Upcoming next, Tensor x, const Tensor& weight, const Tensor& winograd,
                           const Tensor& scale, const Tensor& shift, const Tensor& first_channel,
                           const std::optional<Tensor>& residual, bool overwrite,
                           int64_t activation, std::vector<int64_t> g) {
  constexpr const char* op = "conv_bn_relu";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  check(conv_supported(dtype), op, ": no kernel for ", name_of(x.scalar_type()),
        " on this processor");
  check(g.size() == kCount && g[kR] * g[kS] <= kMaxTaps, op, ": geometry must hold ", int{kCount},
        " values and at most ", kMaxTaps, " taps");
  if (g[kCopiedChannels] > 0) {
    x = with_padding(x, g[kCopiedChannels], g[kPadH], g[kPadW]);
    g[kPadH] = g[kPadW] = 0;
  }
  const Layout4d layout = layout_of(op, x);
  const int64_t C = layout.C, H = x.size(2), W = x.size(3), K = g[kK];
  check(layout.channels_last || C == 1, op, ": x must be channels_last, got strides ",
        strides_of(x), " for shape ", shape_of(x));
  // bfloat16 with float32 weights is computed in float32.
  const ConvVariant variant =
      dtype == kBFloat16
          ? (weight.scalar_type() == ScalarType::Float ? kBFloatWidened : kBFloatPairs)
          : *conv_variant(dtype);
  const int64_t padded = round_up(K, kBlockChannels), pair = variant == kBFloatPairs ? 2 : 1;
  const auto packed_type = variant == kBFloatPairs ? ScalarType::BFloat16 : ScalarType::Float;
  check(weight.scalar_type() == packed_type && weight.dim() == 1 && is_dense(weight) &&
            weight.numel() == g[kR] * g[kS] * round_up(g[kRun], pair) * round_up(K, 16),
        op, ": weight must be packed in x's dtype or float32 for ", K, " outputs, got ",
        name_of(weight.scalar_type()), " of shape ", shape_of(weight));
  const bool grouped = first_channel.numel() > 0;
  const int64_t m = winograd.numel() == 0                              ? 0
                    : winograd.numel() == winograd_products(2) * C * K ? 2
                                                                       : 4;
  if (m > 0)
    check(
        winograd.numel() == winograd_products(m) * C * K && winograd_supported(variant, m) &&
            winograd.scalar_type() == ScalarType::Float && winograd.dim() == 1 &&
            is_dense(winograd) && !grouped && g[kR] == 3 && g[kS] == 3 && g[kStrideH] == 1 &&
            g[kStrideW] == 1 && C % 16 == 0 && K % 16 == 0,
        op,
        ": winograd must be packed in float32 for a 3x3 convolution of stride 1 with multiples of "
        "16 channels and outputs, got ",
        name_of(winograd.scalar_type()), " of shape ", shape_of(winograd));
  check_channel_vector(op, "scale", scale, padded, ScalarType::Float, x);
  check_channel_vector(op, "shift", shift, padded, ScalarType::Float, x);
  if (grouped)
    check(first_channel.scalar_type() == ScalarType::Long && is_dense(first_channel) &&
              first_channel.numel() == padded / 16 && g[kRun] <= C,
          op, ": first_channel must be int64, one per 16 outputs, got shape ",
          shape_of(first_channel));
  else
    check(g[kRun] == C * (g[kS] == 1 && g[kRun] > C ? g[kRun] / C : 1), op, ": x must have ",
          g[kRun], " channels, got ", C);
  const int64_t P = out_size(H, g[kR], g[kStrideH], g[kPadH], g[kDilationH]);
  // A run longer than a pixel covers several: a row of taps at once.
  const int64_t reach = grouped ? 1 : g[kRun] / C;
  const int64_t Q = out_size(W - reach + 1, g[kS], g[kStrideW], g[kPadW], g[kDilationW]);
  // A residual that is x itself is read by other pixels' taps while it would be overwritten.
  const bool in_place = overwrite && residual && residual->const_data_ptr() != x.const_data_ptr();
  Tensor y = in_place ? *residual : empty_channels_last(x, x.size(0), K, P, Q);
  if (residual) check_added(op, "residual", *residual, x, K, P, Q);
  if (y.numel() == 0) return y;
  const std::vector<char> zeros(static_cast<size_t>(C * operand_bytes(variant)), 0);
  ConvBnRelu conv{};
  conv.weight = weight.const_data_ptr();
  if (m > 0) conv.winograd = winograd.const_data_ptr(), conv.winograd_tile = m;
  conv.scale = static_cast<const float*>(scale.const_data_ptr());
  conv.shift = static_cast<const float*>(shift.const_data_ptr());
  if (grouped) conv.first_channel = static_cast<const int64_t*>(first_channel.const_data_ptr());
  if (residual) conv.residual = residual->const_data_ptr();
  conv.y = y.mutable_data_ptr();
  conv.zeros = zeros.data();
  conv.N = x.size(0), conv.C = C, conv.H = H, conv.W = W, conv.K = K, conv.P = P, conv.Q = Q;
  conv.R = g[kR], conv.S = g[kS], conv.run = g[kRun];
  conv.activation = activation_of(op, activation);
  conv.stride_h = g[kStrideH], conv.stride_w = g[kStrideW];
  conv.pad_h = g[kPadH], conv.pad_w = g[kPadW];
  conv.dilation_h = g[kDilationH], conv.dilation_w = g[kDilationW];
  conv.pointwise = conv.R * conv.S * conv.stride_h * conv.stride_w == 1 && conv.pad_h == 0 &&
                   conv.pad_w == 0 && conv.run <= C;
  conv.after = next;
  const Source source(conv, x, variant);
  run_convolution(conv, variant);
  return y;
}

Tensor conv_bn_relu(Tensor x, Tensor weight, Tensor winograd, Tensor scale, Tensor shift,
                    Tensor first_channel, std::optional<Tensor> residual, bool overwrite,
                    int64_t activation, std::vector<int64_t> geometry) {
  return conv_bn_relu_before({}, std::move(x), weight, winograd, scale, shift, first_channel,
                             residual, overwrite, activation, std::move(geometry));
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "conv_bn_relu(Tensor x, Tensor weight, Tensor winograd, Tensor scale, Tensor shift, "
      "Tensor first_channel, Tensor? residual, bool overwrite, int activation, "
      "int[] geometry) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("conv_bn_relu", TORCH_BOX(fused_resnet::conv_bn_relu));
}
