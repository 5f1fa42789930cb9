//! The keys of a hop: one X25519 pair per hop and host, made for it and gone with it.
//!
//! A private key is handed to the WireGuard device of its interface and to nothing else: it is
//! neither written to a file nor sent to the other host, and it can be neither printed nor
//! serialised.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gotatun::x25519;
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// The half of a pair that stays on its host. Its memory is overwritten when it is dropped.
pub struct PrivateKey(x25519::StaticSecret);

impl PrivateKey {
    /// A new key from the system's random source.
    ///
    /// # Errors
    /// [`Error::Random`] if that source fails.
    pub fn generate() -> Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(Error::Random)?;
        let key = Self(x25519::StaticSecret::from(bytes));
        // The copy on the stack: `black_box` keeps the compiler from leaving the write out.
        bytes = [0; 32];
        std::hint::black_box(&bytes);
        Ok(key)
    }

    /// The other half, for the peer.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.0).to_bytes())
    }

    /// The bytes, for the device.
    pub(super) fn expose(&self) -> [u8; 32] {
        self.0.to_bytes()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

/// The half of a pair that the other host gets. Its text is WireGuard's: base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// A text that is not a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a WireGuard public key is 32 bytes in base64")]
pub struct PublicKeyError;

impl PublicKey {
    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<String> for PublicKey {
    type Error = PublicKeyError;

    fn try_from(text: String) -> Result<Self, PublicKeyError> {
        // 44 characters hold 32 bytes; anything longer is not worth decoding.
        if text.len() > 44 {
            return Err(PublicKeyError);
        }
        let bytes = STANDARD.decode(text).map_err(|_| PublicKeyError)?;
        bytes.try_into().map(PublicKey).map_err(|_| PublicKeyError)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        STANDARD.encode(key.0)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_never_print_their_secret() {
        let one = PrivateKey::generate().unwrap();
        let two = PrivateKey::generate().unwrap();
        assert_ne!(one.public(), two.public());
        assert_ne!(one.expose(), [0; 32]);
        assert_eq!(format!("{one:?}"), "PrivateKey(…)");
    }

    #[test]
    fn the_public_half_is_that_of_rfc_7748() {
        // RFC 7748, section 6.1: Alice's private and public key.
        let private = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = [
            0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e,
            0xf7, 0x5a, 0x0d, 0xbf, 0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e,
            0xaa, 0x9b, 0x4e, 0x6a,
        ];
        let key = PrivateKey(x25519::StaticSecret::from(private));
        assert_eq!(key.public().as_bytes(), &public);
    }

    #[test]
    fn the_text_form_is_checked() {
        let key = PrivateKey::generate().unwrap().public();
        let text = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<PublicKey>(&text).unwrap(), key);
        for wrong in [
            "\"\"",
            "\"AAAA\"",
            "\"????\"",
            &format!("\"{}\"", "A".repeat(88)),
        ] {
            assert!(serde_json::from_str::<PublicKey>(wrong).is_err(), "{wrong}");
        }
    }
}
