//! A number that goes round, through threads or through processes: each checks that it is the one that
//! has to come now, and passes on the next. What a move loses, repeats or forgets is found by whoever
//! has it next.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::{Arguments, bad};

/// How long the number rests once a round.
const REST: Duration = Duration::from_millis(1);
/// What the processes have mapped, all of them: how many numbers each has had.
const SHARED: &str = "/dev/shm/ring";
/// More are not asked for: one page of counts.
const MOST: u64 = 512;

static MEMBERS: AtomicU64 = AtomicU64::new(0);
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The number that has to come next, in memory that belongs to the thread.
    static NEXT: Cell<u64> = const { Cell::new(0) };
}

/// What there is to know of the ring.
pub fn report() -> String {
    let [members, rounds, wrong] =
        [&MEMBERS, &ROUNDS, &WRONG].map(|count| count.load(Ordering::Relaxed));
    format!("{{\"members\":{members},\"rounds\":{rounds},\"wrong\":{wrong}}}")
}

/// Whether a number is the one that this thread waits for.
fn expect(number: u64, members: u64) -> bool {
    NEXT.replace(number + members) == number
}

fn members(arguments: &mut Arguments) -> io::Result<u64> {
    let members = arguments.number("MEMBERS")?;
    if !(1..=MOST).contains(&members) {
        return Err(bad(format!("1 to {MOST} members, not {members}")));
    }
    MEMBERS.store(members, Ordering::Relaxed);
    Ok(members)
}

fn round(right: bool) {
    ROUNDS.fetch_add(1, Ordering::Relaxed);
    WRONG.fetch_add(u64::from(!right), Ordering::Relaxed);
    thread::sleep(REST);
}

/// Lets the number go round through threads, each of which waits for the one before it.
pub fn threads(arguments: &mut Arguments) -> io::Result<()> {
    let members = members(arguments)?;
    let (first, mut before) = mpsc::channel();
    for member in 0..members {
        let (sender, next) = mpsc::channel();
        let receiver = std::mem::replace(&mut before, next);
        thread::spawn(move || {
            NEXT.set(member);
            for number in receiver {
                if !expect(number, members) {
                    WRONG.fetch_add(1, Ordering::Relaxed);
                }
                if sender.send(number + 1).is_err() {
                    return;
                }
            }
        });
    }
    thread::spawn(move || {
        NEXT.set(members);
        let mut number = 0;
        while first.send(number).is_ok() {
            let Ok(back) = before.recv() else { return };
            round(expect(back, members));
            number = back;
        }
    });
    Ok(())
}

/// Lets the number go round through processes, each the child of the one before it, by pipes.
pub fn processes(arguments: &mut Arguments) -> io::Result<()> {
    let members = members(arguments)?;
    let counts = Counts::map()?;
    let mut child = relay(members, members, Stdio::piped())?;
    let (input, output) = (child.stdin.take(), child.stdout.take());
    let (Some(mut input), Some(mut output)) = (input, output) else {
        return Err(bad("a child has no pipes"));
    };
    thread::spawn(move || -> io::Result<()> {
        // Its end would be that of the ring.
        let _child = child;
        NEXT.set(members);
        let mut number: u64 = 0;
        loop {
            input.write_all(&number.to_be_bytes())?;
            number = read(&mut output)?;
            let rounds = ROUNDS.load(Ordering::Relaxed) + 1;
            let counted = (0..members).all(|member| counts.of(member) == rounds);
            round(expect(number, members) && counted);
        }
    });
    Ok(())
}

/// One process of the ring, and those after it: `relay MEMBERS LEFT`.
pub fn run_relay(arguments: &mut Arguments) -> io::Result<()> {
    let members = members(arguments)?;
    let left = arguments.number("LEFT")?;
    let own = members - left;
    let counts = Counts::map()?;
    let mut next = match left {
        1 => None,
        _ => Some(relay(members, left - 1, Stdio::inherit())?),
    };
    NEXT.set(own);
    loop {
        // The end of the process before this one is the end of this one.
        let number = read(&mut io::stdin())?;
        if !expect(number, members) {
            return Err(bad(format!("member {own} did not expect {number}")));
        }
        counts.add(own);
        let number = (number + 1).to_be_bytes();
        match next.as_mut().and_then(|next| next.stdin.as_mut()) {
            Some(to) => to.write_all(&number)?,
            None => {
                io::stdout().write_all(&number)?;
                io::stdout().flush()?;
            }
        }
    }
}

fn relay(members: u64, left: u64, output: Stdio) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .args(["relay", &members.to_string(), &left.to_string()])
        .stdin(Stdio::piped())
        .stdout(output)
        .spawn()
}

fn read(from: &mut impl Read) -> io::Result<u64> {
    let mut number = [0; 8];
    from.read_exact(&mut number)?;
    Ok(u64::from_be_bytes(number))
}

/// A page that all processes of the ring have mapped.
struct Counts(&'static [AtomicU64; MOST as usize]);

unsafe extern "C" {
    fn mmap(at: *mut u8, length: usize, protection: i32, flags: i32, fd: i32, from: i64)
    -> *mut u8;
}

impl Counts {
    fn map() -> io::Result<Counts> {
        /// `PROT_READ | PROT_WRITE` and `MAP_SHARED` of the kernel's asm-generic/mman-common.h.
        const READ_WRITE: i32 = 3;
        const SHARE: i32 = 1;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false);
        let file = file.open(SHARED)?;
        let length = size_of::<[AtomicU64; MOST as usize]>();
        file.set_len(length as u64)?;
        let null = std::ptr::null_mut();
        // SAFETY: a new mapping, wherever the kernel puts it.
        let at = unsafe { mmap(null, length, READ_WRITE, SHARE, file.as_raw_fd(), 0) };
        if at as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is as long as the array, aligned to a page, and stays to the end of the process.
        Ok(Counts(unsafe { &*at.cast() }))
    }

    fn of(&self, member: u64) -> u64 {
        self.0[member as usize].load(Ordering::Relaxed)
    }

    fn add(&self, member: u64) {
        self.0[member as usize].fetch_add(1, Ordering::Relaxed);
    }
}
