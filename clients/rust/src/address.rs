//! Where the sidecar is.

use std::env;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;

use crate::error::Error;

/// Where to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// A host by name or number, without brackets, and a port.
    Tcp { host: String, port: u16 },
}

impl Target {
    /// Reads `unix:PATH`, `unix:///PATH`, `HOST:PORT` or `[HOST]:PORT`.
    ///
    /// # Errors
    /// `Invalid` for anything else.
    pub(crate) fn parse(target: &str) -> Result<Self, Error> {
        if let Some(path) = target.strip_prefix("unix:") {
            let path = match path.strip_prefix("//") {
                Some(absolute) if absolute.starts_with('/') => absolute,
                None if !path.is_empty() => path,
                _ => {
                    return Err(Error::invalid(
                        "target: write unix:PATH, or unix:///PATH for an absolute one",
                    ));
                }
            };
            return Ok(Self::Unix(path.into()));
        }
        host_and_port(target)
            .map(|(host, port)| Self::Tcp { host: host.into(), port })
            .ok_or_else(|| Error::invalid("target: write unix:PATH or HOST:PORT ([HOST]:PORT for IPv6)"))
    }

    /// Whether it is this machine by its name or number; no name is looked up.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(address) => address.is_loopback(),
                Err(_) => host.eq_ignore_ascii_case("localhost"),
            },
        }
    }

    /// What a request has as its `:authority`.
    pub(crate) fn authority(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".into(),
            Self::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port } => format!("{host}:{port}"),
        }
    }
}

fn host_and_port(target: &str) -> Option<(&str, u16)> {
    let (host, port) = target.rsplit_once(':')?;
    let port = port.bytes().all(|digit| digit.is_ascii_digit()).then(|| port.parse().ok())??;
    if let Some(host) = host.strip_prefix('[') {
        let host = host.strip_suffix(']')?;
        return host.parse::<Ipv6Addr>().is_ok().then_some((host, port));
    }
    let of_a_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    (!host.is_empty() && host.bytes().all(of_a_name)).then_some((host, port))
}

/// The target when none is given: `KEYTURN_ADDRESS`, else the socket where a sidecar of this user listens.
///
/// # Errors
/// `Invalid` when there is none: no home directory, or an address that is no text.
pub(crate) fn default_target() -> Result<String, Error> {
    match env::var("KEYTURN_ADDRESS") {
        Ok(address) if !address.is_empty() => return Ok(address),
        Err(env::VarError::NotUnicode(_)) => return Err(Error::invalid("KEYTURN_ADDRESS is no text")),
        _ => {}
    }
    let socket = default_socket(is_root(), env::var_os("XDG_RUNTIME_DIR"), env::home_dir)
        .ok_or_else(|| Error::invalid("target: there is no home directory to find the socket in"))?;
    match socket.into_os_string().into_string() {
        Ok(path) => Ok(format!("unix:{path}")),
        Err(_) => Err(Error::invalid("target: the path of the default socket is no text")),
    }
}

fn default_socket(
    root: bool,
    runtime: Option<OsString>,
    home: impl FnOnce() -> Option<PathBuf>,
) -> Option<PathBuf> {
    let directory = match runtime.filter(|directory| !directory.is_empty()) {
        _ if root => PathBuf::from("/run/keyturn"),
        Some(runtime) => PathBuf::from(runtime).join("keyturn"),
        None => home()?.join(".keyturn/run"),
    };
    Some(directory.join("keyturn.sock"))
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn is_root() -> bool {
    // SAFETY: geteuid takes nothing, touches no memory and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Target {
        Target::Tcp { host: host.into(), port }
    }

    #[test]
    fn targets_are_sockets_or_hosts_with_ports() {
        for (text, target) in [
            ("unix:/run/k.sock", Target::Unix("/run/k.sock".into())),
            ("unix:///run/k.sock", Target::Unix("/run/k.sock".into())),
            ("unix:run/k.sock", Target::Unix("run/k.sock".into())),
            ("keyturn:50051", tcp("keyturn", 50051)),
            ("[::1]:50051", tcp("::1", 50051)),
        ] {
            assert_eq!(Target::parse(text).unwrap(), target, "{text}");
        }
        for text in [
            "",
            "unix:",
            "unix://run/k.sock",
            "keyturn",
            ":50051",
            "keyturn:",
            "keyturn:65536",
            "keyturn:+1",
            "::1:50051",
            "[::1]",
            "[keyturn]:1",
            "u@localhost:1",
            "http://localhost:1",
            "a b:1",
            "unix://",
        ] {
            assert!(matches!(Target::parse(text), Err(Error::Invalid(_))), "{text}");
        }
    }

    #[test]
    fn the_default_socket_is_where_a_sidecar_of_this_user_listens() {
        let home = || Some(PathBuf::from("/home/u"));
        for (root, runtime, socket) in [
            (true, Some("/run/user/0"), "/run/keyturn/keyturn.sock"),
            (false, Some("/run/user/1"), "/run/user/1/keyturn/keyturn.sock"),
            (false, Some(""), "/home/u/.keyturn/run/keyturn.sock"),
            (false, None, "/home/u/.keyturn/run/keyturn.sock"),
        ] {
            let runtime = runtime.map(OsString::from);
            assert_eq!(default_socket(root, runtime, home), Some(socket.into()));
        }
        assert_eq!(default_socket(false, None, || None), None);
    }

    #[test]
    fn only_loopback_is_local() {
        for (text, local) in [
            ("unix:k", true),
            ("localhost:1", true),
            ("127.0.0.2:1", true),
            ("[::1]:1", true),
            ("10.0.0.1:1", false),
            ("127.1:1", false),
            ("localhost.example.com:1", false),
            ("[::ffff:127.0.0.1]:1", false),
        ] {
            assert_eq!(Target::parse(text).unwrap().is_local(), local, "{text}");
        }
        assert_eq!(Target::parse("[::1]:9").unwrap().authority(), "[::1]:9");
        assert_eq!(Target::parse("unix:/k").unwrap().authority(), "localhost");
    }
}
