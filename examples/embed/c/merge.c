/* Merge a fine-tuned checkpoint into its base, with one threshold for the whole model and a few MiB of buffers:
 *
 *     merge BASE PATCHED OUT TOP RETAIN MIB
 *
 * does what `safepatch merge` does with `scope: model`, `targets: all`, top TOP, retain RETAIN and one patch that is
 * called "patch", and writes the same bytes. OUT exists; tensors of other dtypes are copied. */
#include <safepatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shards.h"

typedef struct job {
    checkpoint base, patched;
    const char *out;
    double retain;
    int64_t most; /* entries of a chunk */
    void *old_entries, *new_entries;
    sp_engine *engine;
    sp_select *select;
    sp_patch patch;
    sp_block block;
    sp_patch_report found;
    sp_report report;
    int64_t changed;
} job;

static void check(sp_status status) {
    if (status != SP_OK) fail(sp_last_error(), sp_strerror(status));
}

/* Read entries from a file ("rb") or write them into it ("r+b"). */
static void transfer(const char *path, const char *mode, const tensor *t, const sp_block *block, void *data) {
    const size_t w = width(t->dtype), n = (size_t)block->entries;
    FILE *file = fopen(path, mode);
    if (file == NULL || fseek(file, t->start + (long)(block->start * (int64_t)w), SEEK_SET) != 0)
        fail("cannot be opened", path);
    const size_t done = mode[1] == 'b' ? fread(data, w, n, file) : fwrite(data, w, n, file);
    if (done != n || fclose(file) != 0) fail("ends too early, or the disk is full", path);
}

static void load(job *j, const tensor *t, int64_t start) {
    const tensor *p = find_tensor(&j->patched, t->name);
    if (p->entries != t->entries || p->dtype < 0) fail("the patch has another shape or dtype", t->name);
    const int64_t rest = t->entries - start;
    j->block.base.data = j->old_entries;
    j->block.base.dtype = t->dtype;
    j->block.start = start;
    j->block.entries = rest < j->most ? rest : j->most;
    j->patch.values.data = j->new_entries;
    j->patch.values.dtype = p->dtype;
    check(sp_random_key(0, "patch", t->name, &j->patch.random_key));
    transfer(shard_path(j->base.folder, t->shard, j->base.shards), "rb", t, &j->block, j->old_entries);
    transfer(shard_path(j->patched.folder, p->shard, j->patched.shards), "rb", p, &j->block, j->new_entries);
}

static void count(job *j, const tensor *t, size_t target) {
    sp_window windows[SP_SELECT_WINDOWS] = {{sizeof(sp_window), 0, 0, 0, 0, NULL}};
    size_t n;
    check(sp_select_windows(j->select, target, windows, &n));
    check(sp_histogram(j->engine, &j->block, windows, n, &j->report));
    if (j->found.bad_delta.count > 0) fail("a difference is NaN or infinite", t->name);
}

static void apply(job *j, const tensor *t, size_t target) {
    sp_cut cut = {sizeof cut, 0, 0, 0, 0};
    check(sp_select_cuts(j->select, j->engine, target, &j->block, &cut));
    check(sp_apply(j->engine, &j->block, &cut, j->old_entries, &j->report));
    if (j->report.overflow.count > 0) fail("an entry overflows", t->name);
    transfer(shard_path(j->out, t->shard, j->base.shards), "r+b", t, &j->block, j->old_entries);
    j->changed += j->report.changed;
}

/* Take a step for every chunk of every target, in order. */
static void sweep(job *j, void (*step)(job *, const tensor *, size_t)) {
    size_t target = 0;
    for (size_t i = 0; i < j->base.count; ++i) {
        const tensor *t = &j->base.tensors[i];
        if (t->dtype < 0) continue;
        for (int64_t start = 0; start < t->entries; start += j->block.entries) {
            load(j, t, start);
            step(j, t, target);
        }
        ++target;
    }
}

static void open_selection(job *j, double top) {
    size_t targets = 0;
    int64_t entries = 0, quota;
    for (size_t i = 0; i < j->base.count; ++i) {
        if (j->base.tensors[i].dtype < 0) continue;
        entries += j->base.tensors[i].entries;
        ++targets;
    }
    check(sp_quota(top, entries, &quota));
    check(sp_select_open(targets, entries, &quota, 1, &j->select));
}

int main(int argc, char **argv) {
    if (argc != 7) fail("merge BASE PATCHED OUT TOP RETAIN MIB", "usage");
    job j;
    memset(&j, 0, sizeof j);
    j.base = open_checkpoint(argv[1]);
    j.patched = open_checkpoint(argv[2]);
    j.out = argv[3];
    j.most = strtoll(argv[6], NULL, 10) * (1 << 20) / 8; /* two buffers; an entry has 4 bytes at most */
    j.old_entries = malloc((size_t)j.most * 4);
    j.new_entries = malloc((size_t)j.most * 4);
    if (j.most == 0 || j.old_entries == NULL || j.new_entries == NULL) fail("no memory for buffers", argv[6]);
    j.patch.size = sizeof j.patch;
    j.patch.present = 1;
    j.patch.kind = SP_CHECKPOINT;
    j.patch.importance = SP_MAGNITUDE;
    j.patch.scale = 1.0f;
    check(sp_keep(strtod(argv[5], NULL), &j.patch.keep));
    j.block.size = sizeof j.block;
    j.block.patches = &j.patch;
    j.block.patch_count = 1;
    j.block.acts = SP_ALONE;
    j.block.join = SP_SUM;
    j.block.order = SP_RETAIN_FIRST;
    j.found.size = sizeof j.found;
    j.report.size = sizeof j.report;
    j.report.patches = &j.found;

    check(sp_engine_open(2, NULL, &j.engine));
    open_selection(&j, strtod(argv[4], NULL));
    while (sp_select_pending(j.select)) {
        sweep(&j, count);
        check(sp_select_advance(j.select));
    }
    copy_shards(&j.base, j.out, j.old_entries, (size_t)j.most * 4);
    sweep(&j, apply);
    printf("%lld entries changed\n", (long long)j.changed);

    sp_select_close(j.select);
    sp_engine_close(j.engine);
    close_checkpoint(&j.base);
    close_checkpoint(&j.patched);
    free(j.old_entries);
    free(j.new_entries);
    return 0;
}
