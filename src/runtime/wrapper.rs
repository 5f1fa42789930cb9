//! What runs when Podman calls its runtime, and finds livemig under the runtime's name.
//!
//! It is in the way of everything that Podman does, so it does next to nothing: for all but checkpoints
//! and restores of one container it becomes the real runtime at once. For those it looks whether livemig
//! waits for the call, and if not becomes the real runtime as well.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use super::rendezvous::{Call, LONGEST, Order, Outcome, VERSION, line, socket};
use super::setup::Links;
use super::{Invocation, Verb};

/// How long the wrapper waits for orders. Podman gives up after 240 s (`ContainerCreateTimeout` in
/// `libpod/define/config.go`); the end of livemig ends the wait at once.
const PATIENCE: Duration = Duration::from_secs(230);

/// What the program is to be, by the name that it was called by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// An OCI runtime, by this path.
    Runtime(PathBuf),
    /// CRIU, by this path.
    Criu(PathBuf),
    /// Whoever sees to it that a container goes on.
    Thaw,
    /// Whoever sees to it that it does not go on without its memory.
    Keeper,
}

impl Role {
    /// None if it is called by its own name.
    pub fn of(program: Option<&OsStr>) -> Option<Role> {
        let program = PathBuf::from(program?);
        let name = program.file_name()?.to_str()?;
        match name {
            "criu" => Some(Role::Criu(program)),
            super::thaw::NAME => Some(Role::Thaw),
            super::keeper::NAME => Some(Role::Keeper),
            name if super::setup::RUNTIMES.contains(&name) => Some(Role::Runtime(program)),
            _ => None,
        }
    }

    /// Plays it to its end.
    pub fn play(self, arguments: Vec<OsString>) -> ExitCode {
        match self {
            Role::Runtime(program) => run(&program, arguments),
            Role::Criu(program) => super::held_criu::run(&program, arguments),
            Role::Thaw => super::thaw::run(&arguments),
            Role::Keeper => super::keeper::run(&arguments),
        }
    }
}

/// Does what the runtime was called for. Returns only if that did not become the real runtime's work.
fn run(program: &Path, arguments: Vec<OsString>) -> ExitCode {
    let links = Links::beside(program);
    let real = links.real();
    let text: Option<Vec<String>> = arguments
        .iter()
        .map(|argument| argument.to_str().map(str::to_owned))
        .collect();
    if let Some(invocation) = text.as_deref().and_then(Invocation::read) {
        let socket = socket(&links.waiting(), invocation.verb, &invocation.container);
        match UnixStream::connect(socket) {
            Ok(stream) => return attend(stream, &real, invocation),
            // Nobody waits for it.
            Err(error) if is_absent(&error) => {}
            Err(error) => eprintln!("livemig: cannot ask whether this is a migration: {error}"),
        }
    }
    let error = Command::new(&real).args(arguments).exec();
    eprintln!("livemig: cannot become {}: {error}", real.display());
    ExitCode::FAILURE
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// Says how it was called, and does what it is told.
fn attend(stream: UnixStream, real: &Path, invocation: Invocation) -> ExitCode {
    let verb = invocation.verb;
    match obey(stream, real, invocation) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("livemig: the {verb} of a migration was given up: {error}");
            ExitCode::FAILURE
        }
    }
}

fn obey(stream: UnixStream, real: &Path, invocation: Invocation) -> io::Result<ExitCode> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let call = Call {
        version: VERSION,
        program: real.to_owned(),
        invocation,
    };
    stream.get_mut().write_all(&line(&call)?)?;
    let mut text = String::new();
    (&mut stream).take(LONGEST).read_line(&mut text)?;
    if text.is_empty() {
        return Err(io::Error::other("livemig has ended"));
    }
    let order: Order = serde_json::from_str(&text)?;
    match order {
        Order::Pretend => pretend(&call.invocation),
        Order::Refuse { reason } => Err(io::Error::other(reason)),
        Order::Run {
            arguments,
            environment,
        } => {
            let status = run_real(real, &arguments, environment)?;
            let outcome = Outcome {
                success: status.success(),
                status: status.to_string(),
                pid: pid(&call.invocation),
            };
            // Nobody hears it if livemig has ended; the container runs all the same.
            let _ = stream.get_mut().write_all(&line(&outcome)?);
            Ok(code_of(status))
        }
    }
}

/// Leaves what Podman looks for after a checkpoint: the first file that an import asks for.
fn pretend(invocation: &Invocation) -> io::Result<ExitCode> {
    if invocation.verb != Verb::Checkpoint {
        return Err(io::Error::other("only a checkpoint can be pretended"));
    }
    let images = invocation
        .image_path()
        .ok_or_else(|| io::Error::other("it has no --image-path"))?;
    std::fs::create_dir_all(images)?;
    std::fs::write(images.join("inventory.img"), b"")?;
    Ok(ExitCode::SUCCESS)
}

fn run_real(
    real: &Path,
    arguments: &[String],
    environment: BTreeMap<String, PathBuf>,
) -> io::Result<ExitStatus> {
    Command::new(real)
        .args(arguments)
        .envs(environment)
        .status()
}

/// The process that the runtime has brought back.
fn pid(invocation: &Invocation) -> Option<u32> {
    std::fs::read_to_string(invocation.pid_file()?)
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The same end as the real runtime's; one that a signal ended counts as in a shell.
fn code_of(status: ExitStatus) -> ExitCode {
    let number = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}
