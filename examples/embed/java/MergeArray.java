// Merge one array of bf16 entries through Java's Foreign Function & Memory API (Java 22 and later; no jar, no JNI):
//
//     java --enable-native-access=ALL-UNNAMED MergeArray.java LIBRARY BASE PATCHED OUT TOP RETAIN
//
// LIBRARY is libsafepatch.so.N in `python -c "import safepatch_core; print(safepatch_core.get_library_dir())"`.

import static java.lang.foreign.MemoryLayout.PathElement.groupElement;
import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_DOUBLE;
import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.StructLayout;
import java.lang.foreign.SymbolLookup;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.nio.file.Files;
import java.nio.file.Path;

public final class MergeArray {
    private static final int BF16 = 2;

    private static final StructLayout BITS =
            MemoryLayout.structLayout(ADDRESS.withName("data"), JAVA_INT.withName("dtype"), MemoryLayout.paddingLayout(4));
    private static final StructLayout LORA = MemoryLayout.structLayout(
            ADDRESS, ADDRESS, JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_FLOAT, MemoryLayout.paddingLayout(4));
    private static final StructLayout FAULT =
            MemoryLayout.structLayout(JAVA_LONG.withName("count"), JAVA_LONG.withName("first"));
    private static final StructLayout PATCH = MemoryLayout.structLayout(
            JAVA_LONG.withName("size"), JAVA_INT.withName("present"), JAVA_INT.withName("kind"),
            JAVA_INT.withName("importance"), JAVA_INT.withName("weight"), BITS.withName("values"),
            BITS.withName("scores"), LORA.withName("lora"), JAVA_LONG.withName("random_key"),
            JAVA_LONG.withName("keep"), JAVA_FLOAT.withName("scale"), JAVA_INT.withName("reserved"));
    private static final StructLayout BLOCK = MemoryLayout.structLayout(
            JAVA_LONG.withName("size"), BITS.withName("base"), JAVA_LONG.withName("entries"),
            JAVA_LONG.withName("start"), ADDRESS.withName("patches"), JAVA_LONG.withName("patch_count"),
            JAVA_INT.withName("acts"), JAVA_INT.withName("join"), JAVA_INT.withName("order"),
            MemoryLayout.paddingLayout(4), ADDRESS.withName("progress"), ADDRESS.withName("user"));
    private static final StructLayout CUT = MemoryLayout.structLayout(
            JAVA_LONG.withName("size"), JAVA_INT.withName("key"), MemoryLayout.paddingLayout(4),
            JAVA_LONG.withName("before"));
    private static final StructLayout FOUND = MemoryLayout.structLayout(
            JAVA_LONG.withName("size"), JAVA_LONG.withName("eligible"), JAVA_LONG.withName("selected"),
            JAVA_LONG.withName("applied"), FAULT.withName("bad_delta"), FAULT.withName("bad_score"),
            FAULT.withName("negative"));
    private static final StructLayout REPORT = MemoryLayout.structLayout(
            JAVA_LONG.withName("size"), ADDRESS.withName("patches"), FAULT.withName("overflow"),
            JAVA_LONG.withName("acted"), JAVA_LONG.withName("changed"));

    private final Arena arena;
    private final SymbolLookup library;

    private MergeArray(Arena arena, Path library) {
        this.arena = arena;
        this.library = SymbolLookup.libraryLookup(library, arena);
    }

    private MethodHandle call(String name, MemoryLayout result, MemoryLayout... arguments) {
        FunctionDescriptor shape = FunctionDescriptor.of(result, arguments);
        return Linker.nativeLinker().downcallHandle(library.find(name).orElseThrow(), shape);
    }

    private void check(int status) throws Throwable {
        if (status == 0) {
            return;
        }
        MemorySegment text = (MemorySegment) call("sp_last_error", ADDRESS).invokeExact();
        throw new IllegalStateException(text.reinterpret(Long.MAX_VALUE).getString(0));
    }

    /** A zeroed struct that says its size. */
    private MemorySegment struct(StructLayout layout) {
        MemorySegment made = arena.allocate(layout);
        set(made, layout, "size", layout.byteSize());
        return made;
    }

    private static void set(MemorySegment struct, StructLayout layout, String field, Object value) {
        long at = layout.byteOffset(groupElement(field));
        switch (value) {
            case Long number -> struct.set(JAVA_LONG, at, number);
            case Integer number -> struct.set(JAVA_INT, at, number);
            case Float number -> struct.set(JAVA_FLOAT, at, number);
            case MemorySegment pointer -> struct.set(ADDRESS, at, pointer);
            default -> throw new IllegalArgumentException(field);
        }
    }

    private static void setBits(MemorySegment struct, StructLayout layout, String field, MemorySegment entries) {
        long at = layout.byteOffset(groupElement(field));
        set(struct.asSlice(at, BITS), BITS, "data", entries);
        set(struct.asSlice(at, BITS), BITS, "dtype", BF16);
    }

    private long number(String name, ValueLayout first, ValueLayout second, Object a, Object b) throws Throwable {
        MemorySegment out = arena.allocate(JAVA_LONG);
        if (second == null) {
            check((int) call(name, JAVA_INT, first, ADDRESS).invokeWithArguments(a, out));
        } else {
            check((int) call(name, JAVA_INT, first, second, ADDRESS).invokeWithArguments(a, b, out));
        }
        return out.get(JAVA_LONG, 0);
    }

    private long randomKey(long seed, String patch, String tensor) throws Throwable {
        MemorySegment out = arena.allocate(JAVA_LONG);
        MethodHandle call = call("sp_random_key", JAVA_INT, JAVA_LONG, ADDRESS, ADDRESS, ADDRESS);
        check((int) call.invokeExact(seed, arena.allocateFrom(patch), arena.allocateFrom(tensor), out));
        return out.get(JAVA_LONG, 0);
    }

    private MemorySegment entries(Path file) throws Exception {
        byte[] bytes = Files.readAllBytes(file);
        MemorySegment entries = arena.allocate(bytes.length, 8);
        MemorySegment.copy(bytes, 0, entries, ValueLayout.JAVA_BYTE, 0, bytes.length);
        return entries;
    }

    private void merge(MemorySegment base, MemorySegment patched, double top, double retain) throws Throwable {
        long count = base.byteSize() / 2;
        MemorySegment patch = struct(PATCH);
        set(patch, PATCH, "present", 1);
        set(patch, PATCH, "random_key", randomKey(0, "patch", "array"));
        set(patch, PATCH, "keep", number("sp_keep", JAVA_DOUBLE, null, retain, null));
        set(patch, PATCH, "scale", 1f);
        setBits(patch, PATCH, "values", patched);

        MemorySegment block = struct(BLOCK);
        setBits(block, BLOCK, "base", base);
        set(block, BLOCK, "entries", count);
        set(block, BLOCK, "patches", patch);
        set(block, BLOCK, "patch_count", 1L);

        MemorySegment quota = arena.allocate(JAVA_LONG);
        quota.set(JAVA_LONG, 0, number("sp_quota", JAVA_DOUBLE, JAVA_LONG, top, count));
        MemorySegment found = struct(FOUND);
        MemorySegment report = struct(REPORT);
        set(report, REPORT, "patches", found);

        MemorySegment engine = arena.allocate(ADDRESS);
        check((int) call("sp_engine_open", JAVA_INT, JAVA_INT, ADDRESS, ADDRESS)
                .invokeExact(2, MemorySegment.NULL, engine));
        MemorySegment open = engine.get(ADDRESS, 0);
        try {
            MethodHandle merge = call("sp_merge", JAVA_INT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS);
            check((int) merge.invokeExact(open, block, quota, base, struct(CUT), report));
        } finally {
            Linker.nativeLinker()
                    .downcallHandle(library.find("sp_engine_close").orElseThrow(), FunctionDescriptor.ofVoid(ADDRESS))
                    .invokeExact(open);
        }
        System.out.printf("%d selected, %d changed%n", found.get(JAVA_LONG, FOUND.byteOffset(groupElement("selected"))),
                report.get(JAVA_LONG, REPORT.byteOffset(groupElement("changed"))));
    }

    public static void main(String[] given) throws Throwable {
        if (given.length != 6) {
            throw new IllegalArgumentException("usage: MergeArray LIBRARY BASE PATCHED OUT TOP RETAIN");
        }
        try (Arena arena = Arena.ofConfined()) {
            MergeArray program = new MergeArray(arena, Path.of(given[0]));
            MemorySegment base = program.entries(Path.of(given[1]));
            program.merge(base, program.entries(Path.of(given[2])), Double.parseDouble(given[4]),
                    Double.parseDouble(given[5]));
            Files.write(Path.of(given[3]), base.toArray(ValueLayout.JAVA_BYTE));
        }
    }
}
