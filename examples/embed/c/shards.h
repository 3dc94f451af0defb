/* Safetensors checkpoints of numbered shards: where each tensor lies. Enough for an example, and no more. */
#ifndef SHARDS_H
#define SHARDS_H

#include <stddef.h>
#include <stdint.h>

typedef struct tensor {
    char name[256];
    int32_t dtype; /* SP_F32, SP_F16 or SP_BF16; -1 for all others */
    int shard;     /* from 1 */
    int64_t entries;
    long start; /* in the shard's file */
} tensor;

typedef struct checkpoint {
    const char *folder;
    int shards;
    size_t count;
    tensor *tensors; /* in bytewise order of names */
} checkpoint;

/* Read the headers of a folder with model-00001-of-0000N.safetensors or model.safetensors; ends the program with a
 * line on what is wrong. */
checkpoint open_checkpoint(const char *folder);

void close_checkpoint(checkpoint *c);

/* Copy all shards into another folder, through a buffer. */
void copy_shards(const checkpoint *c, const char *out, void *buffer, size_t bytes);

/* The path of a shard in a folder, in a static buffer. */
const char *shard_path(const char *folder, int shard, int shards);

const tensor *find_tensor(const checkpoint *c, const char *name);

/* Bytes of an entry. */
size_t width(int32_t dtype);

void fail(const char *what, const char *which);

#endif
