/* Pillow's resize: along the rows, rounded to bytes, then the columns; weights in 2^-22. */
#include "views.h"

#include <math.h>
#include <string.h>

enum { WEIGHT_BITS = 22 };

/* For each position on an axis of the result: its first tap, their number and weights. */
typedef struct {
    int32_t *first, *taps, *weights;
    int most; /* weights that each place has room for */
    int start, length; /* of the levels that any place reads; `first` counts from `start` */
} Axis;

/* Pixels of the input, or of the result where the axis shrinks, that a weight reaches to each side. */
static double reach_of(Filter filter)
{
    return filter == BICUBIC ? 2.0 : 1.0;
}

static int most_taps(int length, int base, Filter filter)
{
    double scale = (double)length / base;
    return (int)ceil(reach_of(filter) * (scale < 1.0 ? 1.0 : scale)) * 2 + 1;
}

static size_t aligned(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

static size_t axis_bytes(int length, int base, int size, Filter filter)
{
    return aligned(sizeof(int32_t) * size * (2 + (size_t)most_taps(length, base, filter)));
}

/* A triangle, or Keys' cubic with a = -1/2; operations in Pillow's order, which decides last bits. */
static double weight_at(double away, Filter filter)
{
    if (filter == BILINEAR)
        return away < 1.0 ? 1.0 - away : 0.0;
    if (away < 1.0)
        return (1.5 * away - 2.5) * away * away + 1.0;
    return away < 2.0 ? (((away - 5.0) * away + 8.0) * away - 4.0) * -0.5 : 0.0;
}

/* A weight in 2^-22, rounded half away from zero. */
static int32_t whole_weight(double weight)
{
    return (int32_t)((weight < 0.0 ? -0.5 : 0.5) + weight * (1 << WEIGHT_BITS));
}

/* The filter about each of `size` places from `start` on, of `base` to which `length` levels are
 * resized; `stretch` times as wide; double as in Pillow. */
static Axis make_axis(int length, int base, int start, int size, Filter filter, uint8_t *memory)
{
    Axis axis = {.first = (int32_t *)memory, .most = most_taps(length, base, filter)};
    axis.taps = axis.first + size;
    axis.weights = axis.taps + size;
    double scale = (double)length / base, stretch = scale < 1.0 ? 1.0 : scale;
    double reach = reach_of(filter) * stretch;
    for (int place = 0; place < size; place++) {
        double centre = (start + place + 0.5) * scale, total = 0.0;
        int first = (int)(centre - reach + 0.5), end = (int)(centre + reach + 0.5);
        first = first < 0 ? 0 : first;
        end = end > length ? length : end;
        int32_t *weights = axis.weights + (ptrdiff_t)place * axis.most;
        for (int pass = 0; pass < 2; pass++)
            for (int tap = first; tap < end; tap++) {
                double weight = weight_at(fabs((tap - centre + 0.5) * (1.0 / stretch)), filter);
                if (pass == 0)
                    total += weight;
                else
                    weights[tap - first] = whole_weight(total != 0.0 ? weight / total : weight);
            }
        axis.first[place] = first;
        axis.taps[place] = end - first;
    }
    axis.start = axis.first[0];
    axis.length = axis.first[size - 1] + axis.taps[size - 1] - axis.start;
    for (int place = 0; place < size; place++)
        axis.first[place] -= axis.start;
    return axis;
}

/* The level of a sum; a cubic goes below 0 and above 255. */
static inline __attribute__((always_inline)) uint8_t level_of(int32_t sum)
{
    int32_t level = sum >> WEIGHT_BITS;
    level = level < 0 ? 0 : level;
    return (uint8_t)(level > 255 ? 255 : level);
}

/* out[i] = sum of weights[t] * in[t * step + i], rounded to a byte; the sum of the weights is 1. */
static inline __attribute__((always_inline)) void
weighted_sum(const uint8_t *in, ptrdiff_t step, const int32_t *weights, int taps, int count, uint8_t *out)
{
    int32_t sums[64];
    for (int start = 0; start < count; start += 64) {
        int some = count - start < 64 ? count - start : 64;
        for (int i = 0; i < 64; i++)
            sums[i] = 1 << (WEIGHT_BITS - 1);
        for (int tap = 0; tap < taps; tap++) {
            const uint8_t *levels = in + tap * step + start;
            int32_t weight = weights[tap];
            if (some == 64)
                for (int i = 0; i < 64; i++)
                    sums[i] += levels[i] * weight;
            else
                for (int i = 0; i < some; i++)
                    sums[i] += levels[i] * weight;
        }
        for (int i = 0; i < some; i++)
            out[start + i] = level_of(sums[i]);
    }
}

/* One strip of rows: strip[(x * 3 + c) * LANES + row] to out[(c * size + x) * LANES + row]. */
VECTORISED static void along_rows(const uint8_t *strip, Axis axis, int size, uint8_t *out)
{
    for (int x = 0; x < size; x++) {
        const int32_t *weights = axis.weights + (ptrdiff_t)x * axis.most;
        for (int c = 0; c < 3; c++) {
            const uint8_t *in = strip + ((ptrdiff_t)axis.first[x] * 3 + c) * LANES;
            uint8_t *to = out + ((ptrdiff_t)c * size + x) * LANES;
            int32_t sums[LANES];
            for (int i = 0; i < LANES; i++)
                sums[i] = 1 << (WEIGHT_BITS - 1);
            for (int tap = 0; tap < axis.taps[x]; tap++, in += 3 * LANES) {
                int32_t weight = weights[tap];
                for (int i = 0; i < LANES; i++)
                    sums[i] += in[i] * weight;
            }
            for (int i = 0; i < LANES; i++)
                to[i] = level_of(sums[i]);
        }
    }
}

VECTORISED static void along_columns(const uint8_t *rows, Axis axis, int size, Planes planes)
{
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < size; y++)
            weighted_sum(
                rows + ((ptrdiff_t)axis.first[y] * 3 + c) * size,
                (ptrdiff_t)3 * size,
                axis.weights + (ptrdiff_t)y * axis.most,
                axis.taps[y],
                size,
                planes.levels + c * planes.count + (ptrdiff_t)y * size
            );
}

size_t resize_scratch(int window_height, int window_width, int base, int size, Filter filter)
{
    return axis_bytes(window_width, base, size, filter) + axis_bytes(window_height, base, size, filter) +
           aligned((size_t)3 * LANES * window_width) + aligned((size_t)3 * LANES * size) +
           aligned((size_t)3 * size * window_height);
}

void resize_window(Window window, Part part, Planes planes, Filter filter, uint8_t *scratch)
{
    int size = planes.width;
    Axis across = make_axis(window.width, part.base, part.left, size, filter, scratch);
    scratch += axis_bytes(window.width, part.base, size, filter);
    Axis down = make_axis(window.height, part.base, part.top, size, filter, scratch);
    scratch += axis_bytes(window.height, part.base, size, filter);
    uint8_t *strip = scratch, *narrow = strip + aligned((size_t)3 * LANES * window.width);
    uint8_t *rows = narrow + aligned((size_t)3 * LANES * size);
    const uint8_t *pixels = window.pixels + down.start * window.stride + (ptrdiff_t)3 * across.start;
    for (int y = 0; y < down.length; y += LANES) {
        int some = down.length - y < LANES ? down.length - y : LANES;
        transpose_bytes(pixels + y * window.stride, window.stride, some, 3 * across.length, strip, LANES);
        along_rows(strip, across, size, narrow);
        transpose_bytes(narrow, LANES, 3 * size, some, rows + (ptrdiff_t)y * 3 * size, (ptrdiff_t)3 * size);
    }
    along_columns(rows, down, size, planes);
}
