//! The program `corepage`; see `program`.

mod program;

fn main() -> std::process::ExitCode {
    program::cli::main()
}
