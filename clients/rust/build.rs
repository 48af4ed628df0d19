//! Makes the stubs from the protos, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let services = ["protos/keyturn/v1/routing_service.proto"];
    println!("cargo::rerun-if-changed=protos");
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .compile_fds(protox::compile(services, ["protos"])?)?;
    Ok(())
}
