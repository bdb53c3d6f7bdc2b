/* Pillow's Gaussian blur: three extended boxes along the rows, then three along the columns.
 *
 * Levels are bytes in between. Both run down the columns, where neighbours are the lanes of a
 * vector; the planes are transposed for the rows. A running sum down each column makes the cost
 * independent of the radius.
 */
#include "views.h"

#include <string.h>

enum { WEIGHT_BITS = 24 };

/* Row stride in bytes of a buffer whose rows have whole groups of lanes; padding is not read. */
static ptrdiff_t padded(int length)
{
    return (length + LANES - 1) / LANES * LANES;
}

size_t blur_scratch(int height, int width)
{
    ptrdiff_t upright = height * padded(width), turned = width * padded(height);
    return 2 * (size_t)(upright > turned ? upright : turned);
}

/* One box down a group of columns; rows are stride bytes apart. The border's row is repeated. */
static inline __attribute__((always_inline)) void box_of_lanes(
    const uint8_t *restrict in, int height, ptrdiff_t stride, int radius, uint32_t whole, uint32_t edge, uint8_t *restrict out
)
{
    int last = height - 1;
    uint32_t sums[LANES];
    for (int x = 0; x < LANES; x++)
        sums[x] = (uint32_t)in[x] * (uint32_t)(radius + 1);
    for (int y = 1; y <= radius; y++)
        for (int x = 0; x < LANES; x++)
            sums[x] += in[(y < last ? y : last) * stride + x];
    for (int y = 0; y < height; y++) {
        int above = y - radius - 1, below = y + radius + 1, leaving = y - radius;
        const uint8_t *restrict before = in + (above > 0 ? above : 0) * stride;
        const uint8_t *restrict after = in + (below < last ? below : last) * stride;
        const uint8_t *restrict gone = in + (leaving > 0 ? leaving : 0) * stride;
        uint8_t *restrict to = out + y * stride;
        for (int x = 0; x < LANES; x++) {
            uint32_t far = (uint32_t)before[x] + after[x];
            to[x] = (uint8_t)((sums[x] * whole + far * edge + (1u << (WEIGHT_BITS - 1))) >> WEIGHT_BITS);
            sums[x] += (uint32_t)after[x] - gone[x];
        }
    }
}

/* The boxes of one axis, down the columns of `levels`; the result is in `other`. */
VECTORISED static void boxes(
    uint8_t *restrict levels, int height, ptrdiff_t stride, int radius, uint32_t whole, uint32_t edge, uint8_t *restrict other
)
{
    for (ptrdiff_t x = 0; x < stride; x += LANES) {
        box_of_lanes(levels + x, height, stride, radius, whole, edge, other + x);
        box_of_lanes(other + x, height, stride, radius, whole, edge, levels + x);
        box_of_lanes(levels + x, height, stride, radius, whole, edge, other + x);
    }
}

void blur_planes(Planes planes, int radius, uint32_t whole, uint32_t edge, uint8_t *scratch)
{
    int height = planes.height, width = planes.width;
    ptrdiff_t upright = padded(width), turned = padded(height);
    uint8_t *one = scratch, *other = one + blur_scratch(height, width) / 2;
    for (int c = 0; c < 3; c++) {
        uint8_t *plane = planes.levels + c * planes.count;
        transpose_bytes(plane, width, height, width, one, turned);
        boxes(one, width, turned, radius, whole, edge, other);
        transpose_bytes(other, turned, width, height, one, upright);
        boxes(one, height, upright, radius, whole, edge, other);
        for (int y = 0; y < height; y++)
            memcpy(plane + (ptrdiff_t)y * width, other + y * upright, (size_t)width);
    }
}
