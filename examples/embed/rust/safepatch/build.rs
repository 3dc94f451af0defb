//! Programs of this crate find the library where it lies now.

fn main() {
    let folder = std::env::var("DEP_SAFEPATCH_LIBDIR").expect("safepatch-sys tells where the library lies");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
}
