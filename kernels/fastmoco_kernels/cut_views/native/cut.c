/* A batch of views: every calling thread takes the next image, until none is left. */
#include "views.h"

#include <stdatomic.h>
#include <stdlib.h>

/* As declared in `native.py`; the tables are those of `fastmoco_kernels.view_color.plan`. */
typedef struct {
    int64_t images;
    int64_t size;
    int64_t threshold;
    const uint8_t *const *pixels; /* [B], uint8 [H, W, 3], the levels of a row side by side */
    const int64_t *strides;       /* [B], bytes from row to row */
    const int32_t *crops;         /* [B, 4], top, left, height, width */
    const int32_t *steps;         /* [B, 4] */
    const float *factors;         /* [B, 4] */
    const int32_t *hue_shift;     /* [B] */
    const int32_t *flags;         /* [B, 3], grayscale, solarize, flip */
    const int32_t *boxes;         /* [B, 4], radius (-1: no blur), whole, edge, unused */
    const float *scale, *shift;   /* [3] */
    void *out;                    /* [B, 3, size, size], float or uint8_t */
    atomic_llong next;
    /* Read by the functions that end in _part alone: */
    int64_t base;           /* side to which a window is resized before a view is cut from it */
    const int32_t *corners; /* [B, 2], top and left of the view in that */
} Batch;

/* as_levels: write bytes, and leave out the normalisation. */
static void cut_one(
    Batch *batch, int64_t i, Part part, int as_levels, Filter filter, uint8_t *memory, size_t view_bytes
)
{
    int size = (int)batch->size;
    const int32_t *crop = batch->crops + 4 * i, *flags = batch->flags + 3 * i, *box = batch->boxes + 4 * i;
    Planes planes = {memory, size, size, (ptrdiff_t)size * size};
    uint8_t *scratch = memory + view_bytes;
    Window window = {
        batch->pixels[i] + crop[0] * batch->strides[i] + (ptrdiff_t)3 * crop[1], batch->strides[i], crop[2], crop[3]
    };
    resize_window(window, part, planes, filter, scratch);
    for (int step = 0; step < 4; step++)
        jitter_step(planes, batch->steps[4 * i + step], batch->factors + 4 * i, batch->hue_shift[i]);
    if (flags[0])
        to_grey(planes);
    if (box[0] >= 0)
        blur_planes(planes, box[0], (uint32_t)box[1], (uint32_t)box[2], scratch);
    if (flags[1])
        solarize(planes, (int)batch->threshold);
    if (as_levels)
        copy_levels(planes, flags[2], (uint8_t *)batch->out + 3 * planes.count * i);
    else
        normalise(planes, batch->scale, batch->shift, flags[2], (float *)batch->out + 3 * planes.count * i);
}

static int cut_rest(Batch *batch, int parts, int as_levels, Filter filter)
{
    int size = (int)batch->size;
    size_t view_bytes = ((size_t)3 * size * size + 63) & ~(size_t)63, room = 0;
    uint8_t *memory = NULL;
    for (;;) {
        int64_t i = atomic_fetch_add(&batch->next, 1);
        if (i >= batch->images)
            break;
        Part part = {size, 0, 0};
        if (parts)
            part = (Part){(int)batch->base, batch->corners[2 * i], batch->corners[2 * i + 1]};
        size_t resizing = resize_scratch(batch->crops[4 * i + 2], batch->crops[4 * i + 3], part.base, size, filter);
        size_t blurring = blur_scratch(size, size), needed = view_bytes + (resizing > blurring ? resizing : blurring);
        if (needed > room) {
            free(memory);
            room = needed;
            memory = aligned_alloc(64, (needed + 63) & ~(size_t)63);
            if (memory == NULL)
                return -1;
        }
        cut_one(batch, i, part, as_levels, filter, memory, view_bytes);
    }
    free(memory);
    return 0;
}

/* Cut the rest of the batch, to normalised floats or to bytes. Return 0, or -1 without memory. */
__attribute__((visibility("default"))) int fastmoco_cut_views(Batch *batch)
{
    return cut_rest(batch, 0, 0, BILINEAR);
}

__attribute__((visibility("default"))) int fastmoco_cut_levels(Batch *batch)
{
    return cut_rest(batch, 0, 1, BILINEAR);
}

/* The same two, resized by the cubic. */
__attribute__((visibility("default"))) int fastmoco_cut_views_bicubic(Batch *batch)
{
    return cut_rest(batch, 0, 0, BICUBIC);
}

__attribute__((visibility("default"))) int fastmoco_cut_levels_bicubic(Batch *batch)
{
    return cut_rest(batch, 0, 1, BICUBIC);
}

/* The same four, each view a part of the resized window. */
__attribute__((visibility("default"))) int fastmoco_cut_views_part(Batch *batch)
{
    return cut_rest(batch, 1, 0, BILINEAR);
}

__attribute__((visibility("default"))) int fastmoco_cut_levels_part(Batch *batch)
{
    return cut_rest(batch, 1, 1, BILINEAR);
}

__attribute__((visibility("default"))) int fastmoco_cut_views_bicubic_part(Batch *batch)
{
    return cut_rest(batch, 1, 0, BICUBIC);
}

__attribute__((visibility("default"))) int fastmoco_cut_levels_bicubic_part(Batch *batch)
{
    return cut_rest(batch, 1, 1, BICUBIC);
}
