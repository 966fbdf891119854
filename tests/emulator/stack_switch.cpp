// From one stack to another: what lets the emulator leave a thread and come back to it.

#if !defined(__x86_64__)
#error "the emulator switches stacks by x86-64 instructions"
#endif

// Saves the registers that a call keeps (System V ABI), exchanges the stacks, restores them.
// rdi: where to keep the old stack pointer, rsi: the new one.
asm(R"(
.text
.globl fused_resnet_switch_stack
.hidden fused_resnet_switch_stack
.type fused_resnet_switch_stack, @function
fused_resnet_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_resnet_switch_stack, .-fused_resnet_switch_stack
)");
