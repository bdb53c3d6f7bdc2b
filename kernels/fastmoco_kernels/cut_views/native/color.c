/* The jitter, grayscale, solarize and the last step, each in one sweep over the planes. */
#include "views.h"

/* Pillow's blend: the fraction is truncated, and levels outside 0 to 255 are clipped. */
static inline __attribute__((always_inline)) uint8_t blended(uint8_t level, float anchor, float factor)
{
    float moved = anchor + factor * ((float)level - anchor);
    moved = moved < 0.0f ? 0.0f : moved;
    moved = moved > 255.0f ? 255.0f : moved;
    return (uint8_t)(int32_t)moved;
}

/* Mode L: ITU-R 601 in units of 2^-16, rounded. */
static inline __attribute__((always_inline)) int32_t luma(int32_t r, int32_t g, int32_t b)
{
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
}

VECTORISED static void blend_with_level(Planes planes, float anchor, float factor)
{
    for (ptrdiff_t i = 0; i < 3 * planes.count; i++)
        planes.levels[i] = blended(planes.levels[i], anchor, factor);
}

VECTORISED static int64_t luma_sum(const uint8_t *restrict r, const uint8_t *restrict g, const uint8_t *restrict b, ptrdiff_t count)
{
    int64_t total = 0;
    for (ptrdiff_t start = 0; start < count; start += 4096) { /* 4096 levels fit an int32 */
        ptrdiff_t end = start + 4096 < count ? start + 4096 : count;
        int32_t part = 0;
        for (ptrdiff_t i = start; i < end; i++)
            part += luma(r[i], g[i], b[i]);
        total += part;
    }
    return total;
}

VECTORISED static void blend_with_grey(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, ptrdiff_t count, float factor)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        float grey = (float)luma(r[i], g[i], b[i]);
        r[i] = blended(r[i], grey, factor);
        g[i] = blended(g[i], grey, factor);
        b[i] = blended(b[i], grey, factor);
    }
}

/* A channel: round(value * (1 - s * away / 255)), away on a circle of 1530 units. */
static inline __attribute__((always_inline)) uint8_t from_circle(int32_t value, float amount, int32_t away)
{
    away = away < 0 ? 0 : away;
    away = away > 255 ? 255 : away;
    /* The quotient is never a tie: its numerator is even, 65025 is odd. */
    int32_t lost = (int32_t)((amount * (float)away + 32512.0f) / 65025.0f);
    return (uint8_t)(value - lost);
}

/* RGB to HSV in bytes, the hue byte shifted, and back. To HSV in Pillow's own float and double
 * steps, because their rounding decides where a quotient is a whole number; back in integers,
 * which are exact below 2^24 in float. */
VECTORISED static void shift_hue(uint8_t *restrict red, uint8_t *restrict green, uint8_t *restrict blue, ptrdiff_t count, int32_t shift)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t r = red[i], g = green[i], b = blue[i];
        int32_t high = r > g ? r : g, low = r < g ? r : g;
        high = high > b ? high : b;
        low = low < b ? low : b;
        int32_t spread = high - low;
        float some = (float)(spread > 1 ? spread : 1);
        float rc = (float)(high - r) / some, gc = (float)(high - g) / some, bc = (float)(high - b) / some;
        float first = r == high ? bc : g == high ? rc : gc, second = r == high ? gc : g == high ? bc : rc;
        double sector = r == high ? 0.0 : g == high ? 2.0 : 4.0;
        float angle = (float)(sector + (double)first - (double)second);
        double turn = (double)angle / 6.0 + 1.0;
        float hue = (float)(turn >= 1.0 ? turn - 1.0 : turn);
        int32_t byte = (int32_t)((double)hue * 255.0);
        byte = spread == 0 ? 0 : byte;
        int32_t units = 6 * ((byte + shift) & 255);
        float share = (float)spread / (float)(high > 1 ? high : 1);
        float amount = (float)((int32_t)((double)share * 255.0) * high);
        int32_t from_red = units - 765, from_green = units - 510, from_blue = units - 1020;
        red[i] = from_circle(high, amount, 510 - (from_red < 0 ? -from_red : from_red));
        green[i] = from_circle(high, amount, (from_green < 0 ? -from_green : from_green) - 255);
        blue[i] = from_circle(high, amount, (from_blue < 0 ? -from_blue : from_blue) - 255);
    }
}

void jitter_step(Planes planes, int32_t code, const float *factors, int32_t hue_shift)
{
    uint8_t *r = planes.levels, *g = r + planes.count, *b = g + planes.count;
    if (code == 0)
        blend_with_level(planes, 0.0f, factors[0]);
    else if (code == 1) {
        double mean = (double)luma_sum(r, g, b, planes.count) / (double)planes.count;
        blend_with_level(planes, (float)(int32_t)(mean + 0.5), factors[1]);
    } else if (code == 2)
        blend_with_grey(r, g, b, planes.count, factors[2]);
    else if (code == 3)
        shift_hue(r, g, b, planes.count, hue_shift);
}

VECTORISED static void grey_planes(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        r[i] = g[i] = b[i] = (uint8_t)luma(r[i], g[i], b[i]);
}

void to_grey(Planes planes)
{
    grey_planes(planes.levels, planes.levels + planes.count, planes.levels + 2 * planes.count, planes.count);
}

VECTORISED void solarize(Planes planes, int threshold)
{
    for (ptrdiff_t i = 0; i < 3 * planes.count; i++) {
        uint8_t level = planes.levels[i];
        planes.levels[i] = level >= threshold ? (uint8_t)(255 - level) : level;
    }
}

VECTORISED void normalise(Planes planes, const float *scale, const float *shift, int flip, float *out)
{
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < planes.height; y++) {
            const uint8_t *levels = planes.levels + c * planes.count + (ptrdiff_t)y * planes.width;
            float *to = out + c * planes.count + (ptrdiff_t)y * planes.width;
            if (flip)
                for (int x = 0; x < planes.width; x++)
                    to[x] = (float)levels[planes.width - 1 - x] * scale[c] + shift[c];
            else
                for (int x = 0; x < planes.width; x++)
                    to[x] = (float)levels[x] * scale[c] + shift[c];
        }
}

VECTORISED void copy_levels(Planes planes, int flip, uint8_t *out)
{
    if (!flip) {
        __builtin_memcpy(out, planes.levels, 3 * (size_t)planes.count);
        return;
    }
    for (int y = 0; y < 3 * planes.height; y++) {
        const uint8_t *last = planes.levels + (ptrdiff_t)y * planes.width + planes.width - 1;
        uint8_t *restrict to = out + (ptrdiff_t)y * planes.width;
        for (int x = 0; x < planes.width; x++)
            to[x] = last[-x];
    }
}
