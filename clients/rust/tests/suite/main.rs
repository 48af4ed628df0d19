//! The client against a scripted sidecar.

mod background;
mod calls;
mod connecting;
mod errors;
mod gateway;
mod provider;
mod readme;
mod retrying;
mod scripted;
mod secrets;

#[allow(dead_code, clippy::all)]
mod pb {
    tonic::include_proto!("keyturn.v1");
}
