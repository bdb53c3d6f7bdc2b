/* One augmented view of one decoded image, in Pillow's arithmetic: declarations of this folder.
 *
 * Between resize and last step a view is three planes of bytes, which fit a core's L2 cache. Loops
 * are written for the compiler to vectorize, without intrinsics. Products and sums are rounded one
 * by one (-ffp-contract=off), as in Pillow: levels are equal to Pillow's on every machine.
 */
#ifndef FASTMOCO_VIEWS_H
#define FASTMOCO_VIEWS_H

#include <stddef.h>
#include <stdint.h>

/* Compile a function for several instruction sets and choose when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__)
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORISED
#endif

enum { LANES = 32 }; /* rows or columns in parallel */

/* A view's three planes: plane c starts at levels + c * count. */
typedef struct {
    uint8_t *levels;
    int height, width;
    ptrdiff_t count; /* height * width */
} Planes;

/* A window of an interleaved RGB image. */
typedef struct {
    const uint8_t *pixels; /* its first level */
    ptrdiff_t stride;      /* bytes from row to row */
    int height, width;
} Window;

typedef enum { BILINEAR, BICUBIC } Filter;

/* Which part of a resized window is wanted: the window becomes base x base, the part begins there. */
typedef struct {
    int base, top, left;
} Part;

/* Bytes of scratch memory that the functions below need; a part of size x size of a base. */
size_t resize_scratch(int window_height, int window_width, int base, int size, Filter filter);
size_t blur_scratch(int height, int width);

/* Resize a window with antialiasing, as Pillow's Image.resize, and keep the part that fills the
 * planes; nothing else is computed. */
void resize_window(Window window, Part part, Planes planes, Filter filter, uint8_t *scratch);

/* The jitter: codes 0 brightness, 1 contrast, 2 saturation, 3 hue, all else nothing. */
void jitter_step(Planes planes, int32_t code, const float *factors, int32_t hue_shift);
void to_grey(Planes planes);
void solarize(Planes planes, int threshold);

/* Three extended boxes along each axis: radius, weight of whole taps, weight of edge taps. */
void blur_planes(Planes planes, int radius, uint32_t whole, uint32_t edge, uint8_t *scratch);

/* level * scale + shift, in float32, left and right swapped if asked for. */
void normalise(Planes planes, const float *scale, const float *shift, int flip, float *out);

/* The levels as they are, left and right swapped if asked for. */
void copy_levels(Planes planes, int flip, uint8_t *out);

/* [height, width] bytes to [width, height]; strides in bytes from row to row. */
void transpose_bytes(
    const uint8_t *source, ptrdiff_t source_stride, int height, int width, uint8_t *target, ptrdiff_t target_stride
);

#endif
