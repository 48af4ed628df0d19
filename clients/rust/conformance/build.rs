//! Takes the first example out of README.md, for the program `readme`.

use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=../README.md");
    let readme = fs::read_to_string("../README.md")?;
    let (_, from) = readme.split_once("```rust,no_run\n").ok_or("README.md begins with an example")?;
    let (example, _) = from.split_once("```").ok_or("the example ends")?;
    fs::write(
        Path::new(&env::var("OUT_DIR")?).join("readme.rs"),
        example.replace("async fn main", "pub async fn main"),
    )?;
    Ok(())
}
