/* Put a fix file into a checkpoint, take it out, or tell which side the checkpoint is on:
 *
 *     fix check|apply|revert FIX CHECKPOINT
 *
 * changes the shards in place, as `safepatch apply --in-place` does, but for its ledger: a run that is cut off has to be
 * finished by the next one, which is what the word "resume" behind the others asks for. */
#include <errno.h>
#include <safepatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shards.h"

#define MOST_SHARDS 1000

static int64_t read_at(void *user, uint64_t offset, void *data, size_t bytes) {
    FILE *file = user;
    if (fseek(file, (long)offset, SEEK_SET) != 0) return -1;
    const size_t n = fread(data, 1, bytes, file);
    return n > 0 ? (int64_t)n : -1;
}

static int64_t write_at(void *user, uint64_t offset, const void *data, size_t bytes) {
    FILE *file = user;
    if (fseek(file, (long)offset, SEEK_SET) != 0) return -1;
    const size_t n = fwrite(data, 1, bytes, file);
    return n > 0 ? (int64_t)n : -1;
}

/* As far as C99 goes; a program that means it calls fsync too. */
static int flush(void *user) { return fflush(user); }

static int64_t length(void *user) {
    FILE *file = user;
    return fseek(file, 0, SEEK_END) == 0 ? (int64_t)ftell(file) : -1;
}

static sp_io io_of(const char *path, const char *mode) {
    FILE *file = fopen(path, mode);
    if (file == NULL) fail(strerror(errno), path);
    const sp_io io = {sizeof io, file, read_at, write_at, flush, length};
    return io;
}

static void check(sp_status status) {
    if (status != SP_OK) fail(sp_last_error(), sp_strerror(status));
}

int main(int argc, char **argv) {
    if (argc < 4) fail("fix check|apply|revert FIX CHECKPOINT [resume]", "usage");
    static sp_io shards[MOST_SHARDS];
    const int resume = argc > 4 && strcmp(argv[4], "resume") == 0;
    checkpoint c = open_checkpoint(argv[3]);
    for (int i = 0; i < c.shards; ++i) shards[i] = io_of(shard_path(c.folder, i + 1, c.shards), "r+b");
    sp_io file = io_of(argv[2], "rb");
    sp_fix *fix = NULL;
    sp_fix_sides sides = {sizeof sides, 0, 0};
    check(sp_fix_open(&file, &fix));
    if (strcmp(argv[1], "check") == 0) check(sp_fix_check(fix, shards, (size_t)c.shards, &sides));
    if (strcmp(argv[1], "apply") == 0) check(sp_fix_apply(fix, shards, (size_t)c.shards, resume, &sides));
    if (strcmp(argv[1], "revert") == 0) check(sp_fix_revert(fix, shards, (size_t)c.shards, resume, &sides));
    printf("fix %s: found %lld old and %lld new entries\n", sp_fix_id(fix), (long long)sides.old_count,
           (long long)sides.new_count);
    sp_fix_close(fix);
    fclose(file.user);
    for (int i = 0; i < c.shards; ++i)
        if (fclose(shards[i].user) != 0) fail("the disk is full", argv[3]);
    close_checkpoint(&c);
    return 0;
}
