//! Texts that must not be printed by accident.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// A provider key or a token in memory. It prints as `Secret(***)`; [`Secret::reveal`] is the one way out.
///
/// Equality takes the same time wherever the contents differ. There is no `Display`, no `Hash` and no
/// serialization. The memory is overwritten when the secret is dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the text over.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text itself. Search for `.reveal(` to find every place that sees it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for Secret {}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

/// Shorter texts are shown not at all: eight characters would be too much of them.
const LONG_ENOUGH_TO_SHOW: usize = 32;

macro_rules! sealed {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Opaque: a text to send and to store. It prints as its first 8 characters.
        #[derive(Clone, PartialEq, Eq, Hash)]
        pub struct $name(String);

        impl $name {
            /// One again from a stored text.
            pub fn new(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// The whole text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let shown = match self.0.char_indices().nth(8) {
                    Some((end, _)) if self.0.len() >= LONG_ENOUGH_TO_SHOW => &self.0[..end],
                    _ => "",
                };
                write!(f, concat!(stringify!($name), "({}…)"), shown)
            }
        }
    };
}

sealed! {
    /// The sealed text of a key handle.
    SealedHandle
}

sealed! {
    /// The sealed text of a credit ticket.
    SealedTicket
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_equal_by_its_contents_and_prints_none_of_them() {
        let secret = Secret::new("sk-proj-1234567890");
        assert_eq!(secret, Secret::from("sk-proj-1234567890"));
        assert_ne!(secret, Secret::from("sk-proj-1234567891"));
        assert_eq!(format!("{secret:?} {secret:#?}"), "Secret(***) Secret(***)");
        assert_eq!(secret.reveal(), "sk-proj-1234567890");
    }

    #[test]
    fn a_sealed_text_prints_its_first_characters_when_it_is_long() {
        let text = "ü".repeat(40);
        assert_eq!(format!("{:?}", SealedHandle::new(text)), "SealedHandle(üüüüüüüü…)");
        assert_eq!(format!("{:?}", SealedTicket::new("kt1.short")), "SealedTicket(…)");
    }
}
