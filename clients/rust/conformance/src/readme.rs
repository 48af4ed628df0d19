//! The first example of README.md.

mod example {
    include!(concat!(env!("OUT_DIR"), "/readme.rs"));
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // reqwest's default features bring a TLS provider along; those of this workspace do not.
    rustls::crypto::ring::default_provider().install_default().map_err(|_| "a TLS provider is installed")?;
    example::main()
}
