//! The command's exit codes. They are part of its interface: `livemig --help` lists them.

use std::process::ExitCode;

use livemig::{Class, Error};

/// The code that tells a script what became of the container.
pub fn code(error: &Error) -> ExitCode {
    ExitCode::from(number(error))
}

/// The same as a number.
pub fn number(error: &Error) -> u8 {
    match error.class() {
        Class::Unexpected => 1,
        Class::Usage => 2,
        Class::Refused => 3,
        Class::Unreachable => 4,
        Class::RolledBack => 5,
        Class::Leftovers => 6,
        Class::InDoubt => 7,
        Class::Interrupted => 130,
    }
}

/// The container moved, but the source could not be tidied altogether.
pub fn untidy() -> ExitCode {
    ExitCode::from(8)
}

/// A check said no.
pub fn refused() -> ExitCode {
    ExitCode::from(3)
}

/// Something could not be undone.
pub fn leftovers() -> ExitCode {
    ExitCode::from(6)
}
