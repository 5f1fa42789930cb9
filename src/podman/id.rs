//! Identifiers and names, checked before they become part of a path.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// All 64 digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first twelve digits, as Podman shows them.
            pub fn short(&self) -> &str {
                &self.0[..12]
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                let digits = text.strip_prefix("sha256:").unwrap_or(text);
                // Lower case only: these become names of directories.
                if digits.len() == 64
                    && digits
                        .bytes()
                        .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                {
                    Ok(Self(digits.to_owned()))
                } else {
                    Err(Error::Id {
                        kind: $kind,
                        text: text.chars().take(80).collect(),
                    })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// The full ID of a container: 64 hexadecimal digits, the same on every host that it moves to.
    ContainerId,
    "container"
);

identifier!(
    /// The full ID of an image: the SHA-256 of its configuration, without the prefix `sha256:`.
    ImageId,
    "image"
);

/// Refuses a text that Podman could not have accepted as a name, so that it can stand in a path.
///
/// The rule is Podman's own `[a-zA-Z0-9][a-zA-Z0-9_.-]*` (libpod/define/config.go, `NameRegex`).
pub(super) fn check_name(kind: &'static str, name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first
        && name.len() <= 255
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
    {
        Ok(())
    } else {
        Err(Error::Name {
            kind,
            name: name.chars().take(80).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_identifiers_with_and_without_the_digests_prefix() {
        let digits = "6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a";
        let plain: ImageId = digits.parse().unwrap();
        let prefixed: ImageId = format!("sha256:{digits}").parse().unwrap();
        assert_eq!(plain, prefixed);
        assert_eq!(plain.short(), "6b9a7da66579");
        let json = serde_json::to_string(&plain).unwrap();
        assert_eq!(serde_json::from_str::<ImageId>(&json).unwrap(), plain);
    }

    #[test]
    fn refuses_what_is_not_an_identifier() {
        let upper = "A".repeat(64);
        let long = "a".repeat(65);
        for text in ["", "web", "../../etc", upper.as_str(), long.as_str()] {
            assert!(text.parse::<ContainerId>().is_err(), "{text}");
        }
        assert!(serde_json::from_str::<ContainerId>("\"../x\"").is_err());
    }

    #[test]
    fn refuses_names_that_would_change_the_path() {
        for name in ["", "-a", "a/b", "a?force=true", "a b", "a%2fb", "ä"] {
            assert!(check_name("container", name).is_err(), "{name}");
        }
        check_name("container", "web-1_a.b").unwrap();
    }
}
