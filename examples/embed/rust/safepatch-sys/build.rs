//! Finds libsafepatch by pkg-config: PKG_CONFIG_PATH=$(python -m safepatch_core config --pkg-config-dir) cargo build

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    let found = Command::new("pkg-config")
        .args(["--variable=libdir", "safepatch"])
        .output()
        .expect("pkg-config is not installed");
    assert!(found.status.success(), "pkg-config: {}", String::from_utf8_lossy(&found.stderr));
    let folder = String::from_utf8(found.stdout).expect("a path in UTF-8");
    println!("cargo:rustc-link-search=native={}", folder.trim());
    println!("cargo:rustc-link-lib=dylib=safepatch");
    // What depends on this crate finds it as DEP_SAFEPATCH_LIBDIR.
    println!("cargo:libdir={}", folder.trim());
}
