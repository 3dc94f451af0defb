#include "shards.h"

#include <safepatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void fail(const char *what, const char *which) {
    fprintf(stderr, "%s: %s\n", which, what);
    exit(1);
}

size_t width(int32_t dtype) { return dtype == SP_F32 ? 4 : 2; }

const char *shard_path(const char *folder, int shard, int shards) {
    static char path[4096];
    if (shards == 1)
        snprintf(path, sizeof path, "%s/model.safetensors", folder);
    else
        snprintf(path, sizeof path, "%s/model-%05d-of-%05d.safetensors", folder, shard, shards);
    return path;
}

/* The text behind `"key":`, in the object that starts at `at`; every value that is asked for is there. */
static const char *value(const char *at, const char *key, const char *path) {
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    at = strstr(at, quoted);
    if (at == NULL) fail("a header without what a tensor needs", path);
    at += strlen(quoted);
    return at + strspn(at, " ");
}

/* The end of a string that starts behind its quote. */
static const char *string_end(const char *at, const char *path) {
    const char *end = strchr(at, '"');
    if (end == NULL || memchr(at, '\\', (size_t)(end - at)) != NULL) fail("a name with an escape", path);
    return end;
}

static int32_t dtype_of(const char *text) {
    return strncmp(text, "\"F32\"", 5) == 0    ? SP_F32
           : strncmp(text, "\"F16\"", 5) == 0  ? SP_F16
           : strncmp(text, "\"BF16\"", 6) == 0 ? SP_BF16
                                               : -1;
}

/* The tensor whose name starts at `at`; returns the end of its object. */
static const char *read_tensor(const char *at, const char *path, tensor *t) {
    const char *end = string_end(at, path), *object = end, *dims = value(object, "shape", path);
    if ((size_t)(end - at) >= sizeof t->name) fail("a name that is too long", path);
    memcpy(t->name, at, (size_t)(end - at));
    t->name[end - at] = '\0';
    t->dtype = dtype_of(value(object, "dtype", path));
    t->start = strtol(value(object, "data_offsets", path) + 1, NULL, 10);
    for (t->entries = 1; *dims != ']'; dims = strpbrk(dims + 1, ",]"))
        if (dims[1] != ']') t->entries *= strtoll(dims + 1, NULL, 10);
    return strchr(object, '}');
}

static char *read_header(const char *path, long *data) {
    unsigned char size[8];
    FILE *file = fopen(path, "rb");
    if (file == NULL || fread(size, 1, 8, file) != 8) fail("cannot be read", path);
    const long length = size[0] | (long)size[1] << 8 | (long)size[2] << 16 | (long)size[3] << 24;
    char *text = calloc((size_t)length + 1, 1);
    if (text == NULL || fread(text, 1, (size_t)length, file) != (size_t)length) fail("a header cut short", path);
    fclose(file);
    *data = 8 + length;
    return text;
}

static void read_shard(checkpoint *c, int shard) {
    const char *path = shard_path(c->folder, shard, c->shards), *at;
    long data;
    char *text = read_header(path, &data);
    for (at = strchr(text, '"'); at != NULL; at = at == NULL ? NULL : strchr(at, '"')) {
        ++at;
        if (strncmp(at, "__metadata__\"", 13) == 0) {
            at = strchr(at, '}');
            continue;
        }
        c->tensors = realloc(c->tensors, (c->count + 1) * sizeof *c->tensors);
        if (c->tensors == NULL) fail("out of memory", path);
        tensor *t = &c->tensors[c->count++];
        at = read_tensor(at, path, t);
        t->shard = shard;
        t->start += data;
    }
    free(text);
}

static int by_name(const void *a, const void *b) { return strcmp(((const tensor *)a)->name, ((const tensor *)b)->name); }

checkpoint open_checkpoint(const char *folder) {
    checkpoint c = {folder, 0, 0, NULL};
    FILE *first = NULL;
    while (first == NULL && ++c.shards < 1000) first = fopen(shard_path(folder, 1, c.shards), "rb");
    if (first == NULL) fail("no model.safetensors and no model-00001-of-… there", folder);
    fclose(first);
    for (int shard = 1; shard <= c.shards; ++shard) read_shard(&c, shard);
    qsort(c.tensors, c.count, sizeof *c.tensors, by_name);
    return c;
}

void close_checkpoint(checkpoint *c) { free(c->tensors); }

void copy_shards(const checkpoint *c, const char *out, void *buffer, size_t bytes) {
    for (int shard = 1; shard <= c->shards; ++shard) {
        FILE *from = fopen(shard_path(c->folder, shard, c->shards), "rb");
        FILE *to = fopen(shard_path(out, shard, c->shards), "wb");
        size_t n;
        if (from == NULL || to == NULL) fail("cannot be created", out);
        while ((n = fread(buffer, 1, bytes, from)) > 0)
            if (fwrite(buffer, 1, n, to) != n) fail("the disk is full", out);
        fclose(from);
        if (fclose(to) != 0) fail("the disk is full", out);
    }
}

const tensor *find_tensor(const checkpoint *c, const char *name) {
    for (size_t i = 0; i < c->count; ++i)
        if (strcmp(c->tensors[i].name, name) == 0) return &c->tensors[i];
    fail("the patch lacks this tensor", name);
    return NULL;
}
