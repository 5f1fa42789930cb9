//! Versions of programs and kernels, as far as they can be compared.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A version: up to three numbers. What follows them (`-rc1`, `+ds1`, `-amd64`) says something about
/// packaging and is left out.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number; zero if there is none.
    pub patch: u32,
}

impl Version {
    /// A version of two numbers.
    pub const fn new(major: u32, minor: u32) -> Version {
        Version {
            major,
            minor,
            patch: 0,
        }
    }

    /// The first version in a text, such as the first line of what `--version` prints.
    pub fn find(text: &str) -> Option<Version> {
        text.split_whitespace().find_map(|word| {
            let word = word.trim_start_matches('v');
            let digits = word
                .split(|c: char| !c.is_ascii_digit() && c != '.')
                .next()?;
            let mut numbers = digits.split('.').map(|number| number.parse().ok());
            let major = numbers.next()??;
            let minor = numbers.next()??;
            let patch = numbers.next().flatten().unwrap_or(0);
            Some(Version {
                major,
                minor,
                patch,
            })
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.patch > 0 {
            write!(f, ".{}", self.patch)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn found_in_what_programs_print() {
        for (text, expected) in [
            ("Version: 4.2.1\nGitID: v4.2.1-3", (4, 2, 1)),
            ("Version: 4.2", (4, 2, 0)),
            ("crun version 1.28\ncommit: deadbeef1.2", (1, 28, 0)),
            ("runc version 1.3.6+ds1\nspec: 1.2.1", (1, 3, 6)),
            ("6.18.44-fc-v657", (6, 18, 44)),
            ("6.12-rc3", (6, 12, 0)),
            ("v4.0", (4, 0, 0)),
        ] {
            let (major, minor, patch) = expected;
            assert_eq!(
                Version::find(text),
                Some(Version {
                    major,
                    minor,
                    patch
                }),
                "{text}"
            );
        }
        for text in ["", "version unknown", "4", "99999999999.1"] {
            assert_eq!(Version::find(text), None, "{text}");
        }
    }

    #[test]
    fn compared_as_numbers() {
        assert!(Version::new(4, 10) > Version::new(4, 9));
        assert!(
            Version {
                major: 4,
                minor: 2,
                patch: 1
            } > Version::new(4, 2)
        );
    }
}
