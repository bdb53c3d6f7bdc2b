/* Transpose a plane of bytes, sixteen by sixteen at a time. */
#include "views.h"

enum { BLOCK = 16 };

typedef uint8_t Bytes __attribute__((vector_size(16)));

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define LOW(a, b) __builtin_shuffle(a, b, (Bytes){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define HIGH(a, b) __builtin_shuffle(a, b, (Bytes){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

/* Four rounds of interleaving row i with row i + 8 transpose a 16 x 16 block. */
static void block(const uint8_t *source, ptrdiff_t source_stride, uint8_t *target, ptrdiff_t target_stride)
{
    Bytes rows[BLOCK], mixed[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        __builtin_memcpy(&rows[i], source + i * source_stride, BLOCK);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < BLOCK / 2; i++) {
            mixed[2 * i] = LOW(rows[i], rows[i + BLOCK / 2]);
            mixed[2 * i + 1] = HIGH(rows[i], rows[i + BLOCK / 2]);
        }
        for (int i = 0; i < BLOCK; i++)
            rows[i] = mixed[i];
    }
    for (int i = 0; i < BLOCK; i++)
        __builtin_memcpy(target + i * target_stride, &rows[i], BLOCK);
}

void transpose_bytes(
    const uint8_t *source, ptrdiff_t source_stride, int height, int width, uint8_t *target, ptrdiff_t target_stride
)
{
    int whole_height = height - height % BLOCK, whole_width = width - width % BLOCK;
    for (int y = 0; y < whole_height; y += BLOCK)
        for (int x = 0; x < whole_width; x += BLOCK)
            block(source + y * source_stride + x, source_stride, target + x * target_stride + y, target_stride);
    for (int y = 0; y < height; y++)
        for (int x = y < whole_height ? whole_width : 0; x < width; x++)
            target[x * target_stride + y] = source[y * source_stride + x];
}
