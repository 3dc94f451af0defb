//! Merge one array of bf16 entries: merge_array BASE PATCHED OUT TOP RETAIN, files of raw little-endian entries.

use std::error::Error;
use std::{env, fs};

use safepatch::{Engine, Patch};

fn read(path: &str) -> Result<Vec<u16>, Box<dyn Error>> {
    let bytes = fs::read(path)?;
    Ok(bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect())
}

fn main() -> Result<(), Box<dyn Error>> {
    let given: Vec<String> = env::args().skip(1).collect();
    let [base, patched, out, top, retain] = &given[..] else {
        return Err("usage: merge_array BASE PATCHED OUT TOP RETAIN".into());
    };
    let mut entries = read(base)?;
    let patch = Patch { name: "patch", seed: 0, top: top.parse()?, retain: retain.parse()?, scale: 1.0 };
    let merged = Engine::open(2)?.merge("array", &mut entries, &read(patched)?, &patch)?;
    fs::write(out, entries.iter().flat_map(|entry| entry.to_le_bytes()).collect::<Vec<u8>>())?;
    println!("{} selected, {} changed", merged.selected, merged.changed);
    Ok(())
}
