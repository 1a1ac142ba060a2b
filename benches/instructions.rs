//! Does one operation of `corepage::testing::cost` many times, for a counter of instructions around
//! it: `scripts/instructions` runs it under callgrind and works out what an operation costs.
//!
//! `instructions list`; `instructions NAME COUNT`. Compiled without `--cfg fuzzing` there is
//! nothing to run.

#[cfg(fuzzing)]
fn main() {
    use corepage::testing::cost;
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [name, count] = arguments.as_slice() else {
        cost::OPERATIONS.iter().for_each(|operation| println!("{}", operation.name));
        return;
    };
    let count = count.parse().expect("COUNT is a number");
    let done = cost::run(name, count).unwrap_or_else(|| panic!("no operation is named {name}"));
    println!(
        "{} {} {} {} {}",
        done.operations, done.polls, done.disk_reads, done.disk_bytes_written, done.contending
    );
}

#[cfg(not(fuzzing))]
fn main() {
    eprintln!("instructions are counted by scripts/instructions, which compiles this for it");
}
