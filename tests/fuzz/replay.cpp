// Runs a libFuzzer target without libFuzzer: every file of the given folders, then mutations of them for so many
// seconds. For compilers that lack libFuzzer but build all instruction sets. `replay SECONDS FOLDER…`
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" void __sanitizer_set_death_callback(void (*callback)());

using Input = std::vector<uint8_t>;

static Input current;

static void keep() {
    std::FILE* file = std::fopen("crash-replay", "wb");
    if (file == nullptr) return;
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
    std::fputs("the input is in ./crash-replay\n", stderr);
}

static void mutate(Input& input, const Input& other, std::mt19937_64& dice) {
    for (uint64_t i = 1 + dice() % 6; i != 0; --i) {
        const size_t at = input.empty() ? 0 : dice() % input.size();
        switch (input.empty() ? 3 : dice() % 5) {
            case 0:
                input[at] ^= static_cast<uint8_t>(1u << (dice() % 8));
                break;
            case 1:
                input[at] = static_cast<uint8_t>(dice());
                break;
            case 2:
                input.resize(at);
                break;
            case 3:
                input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), 1 + dice() % 16,
                             static_cast<uint8_t>(dice()));
                break;
            default:
                for (size_t j = 0; j < 32 && at + j < std::min(input.size(), other.size()); ++j)
                    input[at + j] = other[at + j];
        }
    }
}

int main(int argc, char** argv) {
    __sanitizer_set_death_callback(keep);
    std::vector<Input> corpus{{}};
    for (int i = 2; i < argc; ++i) {
        for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
            std::ifstream file(entry.path(), std::ios::binary);
            corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        }
    }
    uint64_t runs = 0;
    const auto run = [&](const Input& input) {
        current = input;
        LLVMFuzzerTestOneInput(current.data(), current.size());
        ++runs;
    };
    for (const Input& input : corpus) run(input);
    std::mt19937_64 dice(std::random_device{}());
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(argc > 1 ? std::atoi(argv[1]) : 0);
    while (std::chrono::steady_clock::now() < end) {
        Input input = corpus[dice() % corpus.size()];
        mutate(input, corpus[dice() % corpus.size()], dice);
        run(input);
    }
    std::printf("%llu runs\n", static_cast<unsigned long long>(runs));
}
